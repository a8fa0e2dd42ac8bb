-- Included by every trusted script that files, dispatches or charges a request. The deployment's waiting requests
-- form flows, per band: organization -> project -> key, each with a virtual counter of service received (VTC,
-- arXiv:2401.00588). controlplane/policy/fairness.py is the same thing in Python, and tests hold the two together.
--
-- Keys after dep:<dep>: (all zsets but the last; b is the band)
--   q              waiting requests: resumed ones (score < 0) before all, then by band and instant of admission
--   o:b            organizations that wait, by counter     p:b:<org>   their projects     k:b:<prj>   their keys
--   r:b:<key>      requests of a key, by order key
--   v              hash: counters '<b>o<org>' '<b>p<org>:<prj>' '<b>k<prj>:<key>'; '<b>O' '<b>P<org>' '<b>K<prj>' the
--                  counter of the last flow that left there; 'n<org>' waiting requests; 't' turns, 'w' window, 'a' age_ms,
--                  'u' usual wait, ms; 'm<b>' and 'm' before the name of a counter: slot time (ms) that waits in the band,
--                  in the flow
-- Counters are integers below 2^53 (a prompt token at weight 100 counts 1000), so that Lua's doubles are exact.

local BAND_SPAN = 1e13 -- more than any instant in ms

-- Deployments of which this call knows that nothing waits.
local idle = {}

-- How many requests wait for a deployment.
local function n_waiting(P, did)
  if idle[did] then return 0 end
  local n = redis.call('ZCARD', P .. 'dep:' .. did .. ':q')
  idle[did] = n == 0
  return n
end

-- A flow's place in each level: {zset, member, counter field, field of the last that left, weight}. `f` is a request's
-- {band, weight of key, project, organization, key, project, organization, slot time in ms}.
local function levels_of(P, did, f)
  local Q, b, key, prj, org = P .. 'dep:' .. did .. ':', f[1], f[5], f[6], f[7]
  return {
    {Q .. 'o:' .. b, org, b .. 'o' .. org, b .. 'O', f[4]},
    {Q .. 'p:' .. b .. ':' .. org, prj, b .. 'p' .. org .. ':' .. prj, b .. 'P' .. org, f[3]},
    {Q .. 'k:' .. b .. ':' .. prj, key, b .. 'k' .. prj .. ':' .. key, b .. 'K' .. prj, f[2]},
  }
end

-- The flow of a request from what it was admitted with.
local function flow_of(adm)
  return {adm[BAND], adm[WEIGHTS], adm[WEIGHTS + 1], adm[WEIGHTS + 2], adm[KEY], adm[PRJ], adm[ORG], adm[SLOT_MS] or 0}
end

-- Service in tenths of a prompt token: a cached one costs a tenth of it, an output token twice.
local function service(n_in, n_cached, n_out)
  return 10 * (n_in - n_cached) + n_cached + 20 * n_out
end

-- What a charge of `tenths` adds to a counter of this weight (100 = ordinary).
local function virtual(tenths, weight)
  return math.floor(tenths * 10000 / weight)
end

-- Moves a request's charge from `before` to `after` tenths in the three counters of its flow. While something waits
-- (`waits`), a flow that waits changes its place. While nothing does, the flow counts as one that joins and leaves in
-- this instant: it is lifted, and is the last that left.
local function charge(P, did, f, before, after, waits)
  local h, lv = P .. 'dep:' .. did .. ':v', levels_of(P, did, f)
  local v = redis.call('HMGET', h, lv[1][3], lv[2][3], lv[3][3], lv[1][4], lv[2][4], lv[3][4])
  local set = {}
  for i = 1, 3 do
    local left = tonumber(v[i + 3] or '0')
    local now = tonumber(v[i] or left)
    if not waits and now < left then now = left end
    now = string.format('%.0f', now + virtual(after, lv[i][5]) - virtual(before, lv[i][5]))
    set[#set + 1] = lv[i][3]
    set[#set + 1] = now
    if waits then
      redis.call('ZADD', lv[i][1], 'XX', now, lv[i][2])
    else
      set[#set + 1] = lv[i][4]
      set[#set + 1] = now
    end
  end
  redis.call('HSET', h, unpack(set))
end

-- Files a request under its flow. A flow that had nothing waiting is lifted, never lowered: to the least counter
-- among those that wait beside it, or to that of the last that left.
local function join(P, did, id, f, order_key, now_ms)
  idle[did] = nil
  local Q, h = P .. 'dep:' .. did .. ':', P .. 'dep:' .. did .. ':v'
  for _, l in ipairs(levels_of(P, did, f)) do
    if not redis.call('ZSCORE', l[1], l[2]) then
      local v = redis.call('HMGET', h, l[3], l[4])
      local least = redis.call('ZRANGE', l[1], 0, 0, 'WITHSCORES')[2]
      local base = tonumber(least or v[2] or '0')
      local now = string.format('%.0f', math.max(tonumber(v[1] or '0'), base))
      redis.call('HSET', h, l[3], now)
      redis.call('ZADD', l[1], now, l[2])
    end
  end
  redis.call('ZADD', Q .. 'r:' .. f[1] .. ':' .. f[5], order_key, id)
  redis.call('ZADD', Q .. 'q', string.format('%.0f', f[1] * BAND_SPAN + now_ms), id)
  redis.call('HINCRBY', h, 'n' .. f[7], 1)
  if f[8] > 0 then
    redis.call('HINCRBY', h, 'm' .. f[1], f[8])
    for _, l in ipairs(levels_of(P, did, f)) do redis.call('HINCRBY', h, 'm' .. l[3], f[8]) end
  end
end

-- Slot time (ms) of the waiting requests that will probably go before one that joins this flow now: what waits in its
-- own key, and of each flow beside it, at each level, as much by weight, and what the window lets it get ahead; never
-- more than waits there; and all of the bands before.
local function ahead_of(P, did, f, window_ms)
  local h, lv = P .. 'dep:' .. did .. ':v', levels_of(P, did, f)
  local ask = {'m' .. lv[3][3], 'm' .. lv[2][3], 'm' .. lv[1][3], 'm' .. f[1]}
  for b = 0, tonumber(f[1]) - 1 do ask[#ask + 1] = 'm' .. b end
  local waits = redis.call('HMGET', h, unpack(ask))
  local ahead = tonumber(waits[1] or '0')
  for i = 3, 1, -1 do
    local l = lv[i]
    local n_others = redis.call('ZCARD', l[1])
    if n_others > 0 and redis.call('ZSCORE', l[1], l[2]) then n_others = n_others - 1 end
    if n_others > 0 then
      local theirs = n_others * (math.floor(ahead * 100 / l[5]) + window_ms)
      ahead = math.min(tonumber(waits[5 - i] or '0'), ahead + theirs)
    end
  end
  for i = 5, #ask do ahead = ahead + tonumber(waits[i] or '0') end
  return ahead
end

-- Whether the deployment has replicas and none of them a free slot.
local function is_taken(P, did)
  local reps = redis.call('SMEMBERS', P .. 'dep:' .. did .. ':reps')
  for _, rid in ipairs(reps) do
    local r = redis.call('HMGET', P .. 'rep:' .. rid, 'state', 'used', 'slots')
    if r[1] == 'ready' and tonumber(r[2] or '0') < tonumber(r[3] or '0') then return false end
  end
  return #reps > 0
end

-- Whether a queue of `depth` has no place for this organization, and whose bound says so; nil when it has. An
-- organization may hold three times what it leaves free (a dynamic threshold, Choudhury and Hahne 1998): alone three
-- quarters of the queue, and whoever else comes finds room.
local function full(P, did, org, depth, bound)
  if depth >= bound then return 'deployment' end
  local n = tonumber(redis.call('HGET', P .. 'dep:' .. did .. ':v', 'n' .. org) or '0')
  if n >= 3 * (bound - depth) then return 'organization' end
  return nil
end

-- Takes a request out, wherever it waits, and charges its flow with `tenths`. Flows that have nothing left leave, and
-- say at which counter.
local function leave(P, did, id, f, tenths)
  local Q, h, lv = P .. 'dep:' .. did .. ':', P .. 'dep:' .. did .. ':v', levels_of(P, did, f)
  redis.call('ZREM', Q .. 'q', id)
  local under = Q .. 'r:' .. f[1] .. ':' .. f[5]
  if redis.call('ZREM', under, id) == 0 then return end -- a resumed request waits outside the flows
  local v = redis.call('HMGET', h, lv[1][3], lv[2][3], lv[3][3], 'n' .. f[7])
  local is_last = redis.call('EXISTS', under) == 0
  local set = {'n' .. f[7], v[4] - 1}
  for i = 3, 1, -1 do
    local l = lv[i]
    local now = string.format('%.0f', v[i] + virtual(tenths, l[5]))
    set[#set + 1] = l[3]
    set[#set + 1] = now
    if is_last then
      set[#set + 1] = l[4]
      set[#set + 1] = now
      redis.call('ZREM', l[1], l[2])
      redis.call('HDEL', h, 'm' .. l[3])
      is_last = i > 1 and redis.call('EXISTS', l[1]) == 0
    else
      if tenths > 0 then redis.call('ZADD', l[1], now, l[2]) end
      if (f[8] or 0) > 0 then redis.call('HINCRBY', h, 'm' .. l[3], -f[8]) end
    end
  end
  if redis.call('EXISTS', lv[1][1]) == 0 then
    redis.call('HDEL', h, 'm' .. f[1]) -- whatever was lost on the way is made good
  elseif (f[8] or 0) > 0 then
    redis.call('HINCRBY', h, 'm' .. f[1], -f[8])
  end
  redis.call('HSET', h, unpack(set))
  if v[4] == '1' then redis.call('HDEL', h, 'n' .. f[7]) end
end
