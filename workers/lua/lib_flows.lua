-- Included after lib_service by every trusted script that files, dispatches or charges a request. A deployment's waiting
-- requests form flows, per band: organization -> project -> key, each with a virtual counter of service received (VTC,
-- arXiv:2401.00588). controlplane/policy/waitingflows.py is the same thing in Python, and tests hold the two together.
--
-- Keys after dep:<dep>: (all zsets but the last; b is the band)
--   q              waiting requests: resumed ones (score < 0) before all, then by band and instant of admission
--   o:b            organizations that wait, by counter     p:b:<org>   their projects     k:b:<prj>   their keys
--   r:b:<key>      requests of a key, by order key
--   v              hash: counters '<b>o<org>' '<b>p<org>:<prj>' '<b>k<prj>:<key>'; '<b>O' '<b>P<org>' '<b>K<prj>' the
--                  counter of the last flow that left there; 'n<org>' waiting requests; 't' turns, 'w' window, 'a' age_ms,
--                  'u' usual wait, ms; 'm<b>' and 'm' before the name of a counter: slot time (ms) that waits in the band,
--                  in the flow; 'c' before it: what that will add to the counter
-- Counters are integers below 2^53 (a prompt token at weight 100 counts 1000), so that Lua's doubles are exact.

local BESIDE = 8       -- flows of a level looked at one by one; what waits in the others is taken like the last of these

-- A flow's place in each level: {zset, member, counter field, field of the last that left, weight}. `f` is a request's
-- {band, weight of key, project, organization, key, project, organization, slot time in ms, service in tenths}.
local function levels_of(P, did, f)
  local Q, b, key, prj, org = P .. 'dep:' .. did .. ':', f[1], f[5], f[6], f[7]
  return {
    {Q .. 'o:' .. b, org, b .. 'o' .. org, b .. 'O', f[4]},
    {Q .. 'p:' .. b .. ':' .. org, prj, b .. 'p' .. org .. ':' .. prj, b .. 'P' .. org, f[3]},
    {Q .. 'k:' .. b .. ':' .. prj, key, b .. 'k' .. prj .. ':' .. key, b .. 'K' .. prj, f[2]},
  }
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

-- Fields of what waits, as write_sums takes them: requests of the organization, slot time of the band, and slot time and
-- service of each flow.
local function sums_of(f, lv)
  local out = {'n' .. f[7], 'm' .. f[1]}
  for _, l in ipairs(lv) do
    out[#out + 1] = 'm' .. l[3]
    out[#out + 1] = 'c' .. l[3]
  end
  return out
end

-- Adds a request (`by` 1) to these sums as they stand, or takes it out (-1). What was lost on the way is made good: no
-- sum is below 0, one that is 0 is no field, and those in `over`, of which nothing waits, are 0.
local function write_sums(h, f, lv, sums, by, over)
  local names, set, gone = sums_of(f, lv), {}, {}
  local more = {1, f[8] or 0}
  for _, l in ipairs(lv) do
    more[#more + 1] = f[8] or 0
    more[#more + 1] = virtual(f[9] or 0, l[5])
  end
  for i, name in ipairs(names) do
    local now = over and over[i] and 0 or sums[i] + by * more[i]
    if now > 0 then
      set[#set + 1] = name
      set[#set + 1] = string.format('%.0f', now)
    elseif sums[i] ~= 0 then
      gone[#gone + 1] = name
    end
  end
  if set[1] then redis.call('HSET', h, unpack(set)) end
  if gone[1] then redis.call('HDEL', h, unpack(gone)) end
end

-- Files a request under its flow. A flow that had nothing waiting is lifted, never lowered: to the least counter
-- among those that wait beside it, or to that of the last that left.
local function join(P, did, id, f, order_key, now_ms)
  idle[did] = nil
  local Q, h, lv = P .. 'dep:' .. did .. ':', P .. 'dep:' .. did .. ':v', levels_of(P, did, f)
  for _, l in ipairs(lv) do
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
  local set = {}
  for i, now in ipairs(redis.call('HMGET', h, unpack(sums_of(f, lv)))) do set[i] = tonumber(now or '0') end
  write_sums(h, f, lv, set, 1)
end

-- Slot time (ms) of the waiting requests that will probably go before one that joins this flow now: what waits in its
-- own key; of each flow beside it, at each level, what will be served until its counter is where ours will be then, and
-- the window beyond; and all of the bands before. Who waits now counts, not who will come.
local function ahead_of(P, did, f, window)
  local Q, h, lv = P .. 'dep:' .. did .. ':', P .. 'dep:' .. did .. ':v', levels_of(P, did, f)
  local ask = {'m' .. f[1]}
  for _, l in ipairs(lv) do
    ask[#ask + 1] = 'm' .. l[3]
    ask[#ask + 1] = 'c' .. l[3]
    ask[#ask + 1] = l[3]
  end
  for b = 0, tonumber(f[1]) - 1 do ask[#ask + 1] = 'm' .. b end
  local v = redis.call('HMGET', h, unpack(ask))
  for i = 1, #ask do v[i] = tonumber(v[i] or '0') end
  local ahead = v[8] -- of the key
  for i = 3, 1, -1 do
    local l, own_ms, own = lv[i], v[3 * i - 1], v[3 * i]
    local e = redis.call('ZRANGE', l[1], 0, BESIDE, 'WITHSCORES')
    local fields, scores = {}, {}
    for k = 1, #e, 2 do
      if e[k] ~= l[2] and #scores < BESIDE then
        local name = string.sub(l[3], 1, -1 - #l[2]) .. e[k]
        fields[#fields + 1] = 'm' .. name
        fields[#fields + 1] = 'c' .. name
        scores[#scores + 1] = tonumber(e[k + 1])
      end
    end
    if scores[1] then
      local reach = math.max(v[3 * i + 1], tonumber(e[2])) + window
      if own_ms > 0 then reach = reach + math.floor(own * ahead / own_ms) end
      local theirs, rest, share = redis.call('HMGET', h, unpack(fields)), (i > 1 and v[3 * i - 4] or v[1]) - own_ms, 0
      for k, score in ipairs(scores) do
        local ms, cost = tonumber(theirs[2 * k - 1] or '0'), tonumber(theirs[2 * k] or '0')
        share = cost > 0 and math.min(math.max(reach - score, 0) / cost, 1) or 1
        rest = rest - ms
        ahead = ahead + math.floor(ms * share)
      end
      if rest > 0 and #scores == BESIDE then ahead = ahead + math.floor(rest * share) end
    end
  end
  for i = 11, #ask do ahead = ahead + v[i] end
  return ahead
end

-- Whether others wait beside this organization in its band, and it has no more slot time waiting than `most_ms` of its
-- share of the slots by weight: then it is late because of them, and to refuse it would give them its share as well.
local function within_share(P, did, f, most_ms)
  local l = levels_of(P, did, f)[1]
  local n_others = redis.call('ZCARD', l[1])
  if n_others > 0 and redis.call('ZSCORE', l[1], l[2]) then n_others = n_others - 1 end
  if n_others == 0 then return false end
  local own_ms = tonumber(redis.call('HGET', P .. 'dep:' .. did .. ':v', 'm' .. l[3]) or '0')
  return own_ms + math.floor(own_ms * n_others * 100 / l[5]) <= most_ms
end

-- Whether the deployment has replicas and none of them a free slot.
local function is_taken(P, did)
  local reps = redis.call('SMEMBERS', P .. 'dep:' .. did .. ':reps')
  for _, rid in ipairs(reps) do
    local r = redis.call('HMGET', P .. 'rep:' .. rid, 'state', 'used', 'slots', 'share')
    if r[1] == 'ready' and not r[4] and tonumber(r[2] or '0') < tonumber(r[3] or '0') then return false end
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
  local v = redis.call('HMGET', h, lv[1][3], lv[2][3], lv[3][3], unpack(sums_of(f, lv)))
  local sums, over, set, is_last = {}, {}, {}, redis.call('EXISTS', under) == 0
  for i = 4, #v do sums[i - 3] = tonumber(v[i] or '0') end
  for i = 3, 1, -1 do
    local l = lv[i]
    local now = string.format('%.0f', v[i] + virtual(tenths, l[5]))
    set[#set + 1] = l[3]
    set[#set + 1] = now
    if is_last then
      set[#set + 1] = l[4]
      set[#set + 1] = now
      redis.call('ZREM', l[1], l[2])
      over[2 * i + 1], over[2 * i + 2] = true, true
      is_last = redis.call('EXISTS', l[1]) == 0
    elseif tenths > 0 then
      redis.call('ZADD', l[1], now, l[2])
    end
  end
  over[2] = is_last
  redis.call('HSET', h, unpack(set))
  write_sums(h, f, lv, sums, -1, over)
end
