-- Included after lib_bind and lib_flows: which waiting request a free slot gets. The same rules as next_for() and
-- pump() in controlplane/policy/fairness.py.

local K = 8               -- flows looked at for a cached prefix
local AGED_TURN = 8       -- every so many dispatches one may go to a lower band that waited long
local MAX_BOUND = 256     -- by one call; who expects more calls again (autoscaler/cell/routing.py)
local MARK = 126          -- '~': begins the mark of a LoRA adapter, which stands before the prefixes
local PREFIX_TOKENS = 64  -- of the first prefix; each further one is twice as long
local AGE_FOLLOWS = 4     -- who has waited so many times the usual wait goes first, once that is more than age_ms,
local AGE_MOST = 16       -- and whoever has waited so many times age_ms in any case
local WAIT_SHARE = 8      -- one over the weight of the latest wait in the usual one

-- How many of a request's prefixes (shortest first, PREFIX_CHARS each) the replica holds by our books.
local function cached_prefixes(P, rid, pfx)
  local n = #pfx / PREFIX_CHARS
  if n == 0 then return 0 end
  write_prefixes(replica_of(P, rid))
  local ask = {}
  for i = 1, n do ask[i] = string.sub(pfx, (i - 1) * PREFIX_CHARS + 1, i * PREFIX_CHARS) end
  local found = redis.call('ZMSCORE', P .. 'rep:' .. rid .. ':px', unpack(ask))
  for i = n, 1, -1 do
    if found[i] then return i end
  end
  return 0
end

-- The band to serve, given the first entry of q: the lowest, but every AGED_TURN-th time the one that is most overdue.
-- A band is overdue once its oldest request has waited age_ms for each band between it and the lowest that waits.
local function next_band(Q, first_score, now_ms, age_ms)
  local lowest, aged, worst = math.floor(first_score / BAND_SPAN), nil, -1
  local highest = math.floor(redis.call('ZRANGE', Q .. 'q', -1, -1, 'WITHSCORES')[2] / BAND_SPAN)
  local b = lowest
  while b < highest do
    local from = string.format('%.0f', (b + 1) * BAND_SPAN)
    local score = redis.call('ZRANGEBYSCORE', Q .. 'q', from, '+inf', 'WITHSCORES', 'LIMIT', 0, 1)[2]
    b = math.floor(score / BAND_SPAN)
    local overdue_ms = now_ms - (score - b * BAND_SPAN) - age_ms * (b - lowest)
    if overdue_ms > worst then worst, aged = overdue_ms, b end
  end
  if not aged then return lowest end
  if redis.call('HINCRBY', Q .. 'v', 't', 1) < AGED_TURN then return lowest end
  redis.call('HSET', Q .. 'v', 't', 0)
  return aged
end

-- Members whose counters lie within `window` of the least, at most K, in order.
local function within(zset, window)
  local e, out = redis.call('ZRANGE', zset, 0, K - 1, 'WITHSCORES'), {}
  for i = 1, #e, 2 do
    if tonumber(e[i + 1]) > tonumber(e[2]) + window then break end
    out[#out + 1] = e[i]
  end
  return out
end

-- Flows to choose from, in order: where more than one organization lies within the window, those; else the projects of
-- the one; else the keys of that. Each is {organization, project or nil, key or nil}.
local function flows_to_ask(Q, b, window)
  local out, orgs = {}, within(Q .. 'o:' .. b, window)
  if #orgs ~= 1 then
    for i, org in ipairs(orgs) do out[i] = {org} end
    return out
  end
  local prjs = within(Q .. 'p:' .. b .. ':' .. orgs[1], window)
  if #prjs ~= 1 then
    for i, prj in ipairs(prjs) do out[i] = {orgs[1], prj} end
    return out
  end
  for i, key in ipairs(within(Q .. 'k:' .. b .. ':' .. prjs[1], window)) do out[i] = {orgs[1], prjs[1], key} end
  return out
end

local function first_of(zset)
  return redis.call('ZRANGE', zset, 0, 0)[1]
end

local function by_order_key(x, y)
  if x[5] ~= y[5] then return x[5] < y[5] end
  return x[4] < y[4]
end

-- The first requests of these flows by order key: {organization, project, key, request, order key}.
local function heads(Q, b, window)
  local out = flows_to_ask(Q, b, window)
  for _, flow in ipairs(out) do
    flow[2] = flow[2] or first_of(Q .. 'p:' .. b .. ':' .. flow[1])
    flow[3] = flow[3] or first_of(Q .. 'k:' .. b .. ':' .. flow[2])
    local head = redis.call('ZRANGE', Q .. 'r:' .. b .. ':' .. flow[3], 0, 0, 'WITHSCORES')
    flow[4], flow[5] = head[1], tonumber(head[2])
  end
  if #out > 1 then table.sort(out, by_order_key) end
  return out
end

-- The oldest request of band b as {organization, project, key, request}, if none of its flows has had more than the
-- window allows; else nil.
local function within_window(P, Q, b, id, window)
  local adm = admitted(redis.call('HGET', P .. 'req:' .. id, 'adm'), P .. 'req:' .. id)
  if not adm then return nil end
  local org, prj, key = adm[ORG], adm[PRJ], adm[KEY]
  local levels = {{'o:' .. b, org}, {'p:' .. b .. ':' .. org, prj}, {'k:' .. b .. ':' .. prj, key}}
  for _, l in ipairs(levels) do
    local own = redis.call('ZSCORE', Q .. l[1], l[2])
    local least = redis.call('ZRANGE', Q .. l[1], 0, 0, 'WITHSCORES')[2]
    if not own or tonumber(own) > tonumber(least) + window then return nil end
  end
  return {org, prj, key, id}
end

-- After how long a request goes before all others of its band, the usual wait at dispatch being usual_ms.
local function patience(age_ms, usual_ms)
  return math.min(math.max(age_ms, AGE_FOLLOWS * usual_ms), AGE_MOST * age_ms)
end

-- The request of band b that has waited longest, if that is age_ms and its flows are within the window. `first` and
-- `score`: the first entry of q that waits in a flow.
local function overdue(P, Q, b, first, score, now_ms, age_ms, window)
  if math.floor(score / BAND_SPAN) ~= b then
    local from = string.format('%.0f', b * BAND_SPAN)
    local e = redis.call('ZRANGEBYSCORE', Q .. 'q', from, '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
    first, score = e[1], tonumber(e[2])
  end
  if now_ms - (score - b * BAND_SPAN) < age_ms then return nil end
  return within_window(P, Q, b, first, window)
end

-- The request to dispatch to this replica: the first of these, or one behind it that has more prefixes cached there. One
-- that has all of them (or none at all: a short prompt) is not passed over.
-- Returns {organization, project, key, request}, what it was admitted with, and the number of prefixes.
local function choose(P, rid, requests)
  local best, best_adm, best_n = nil, nil, -1
  for _, flow in ipairs(requests) do
    local rec_key = P .. 'req:' .. flow[4]
    local adm = admitted(redis.call('HGET', rec_key, 'adm'), rec_key) -- nothing: its record is lost
    local pfx = adm and adm[PFX] or ''
    local n = cached_prefixes(P, rid, pfx)
    if n > best_n then
      best, best_adm, best_n = flow, adm, n
      if n * PREFIX_CHARS == #pfx then break end
    end
  end
  return best, best_adm, best_n
end

-- Those of the first requests that are the canary's, by their ids.
local function of_share(share, requests)
  local out = {}
  for _, flow in ipairs(requests) do
    if takes(share, flow[4]) then out[#out + 1] = flow end
  end
  return out
end

-- Takes the next request for this replica out of the queue and binds it. Returns 1 when it did, 0 when that one could
-- not be served (its body is gone), nil when nothing waits, false when what waits is not for this replica: a canary is
-- given its share of the requests, and nothing that ran before.
local function dispatch(P, did, rid, mid, now_ms)
  local Q = P .. 'dep:' .. did .. ':'
  local first = redis.call('ZRANGE', Q .. 'q', 0, 0, 'WITHSCORES')
  if not first[1] then return nil end
  local share = replica_of(P, rid).share
  if tonumber(first[2]) < 0 and share then return false end
  if tonumber(first[2]) < 0 then -- resumed: it was charged when it was first bound
    if not replica_of(P, rid).ext or (redis.call('HGET', P .. 'req:' .. first[1], 'n') or '0') == '0' then
      redis.call('ZREM', Q .. 'q', first[1])
      return bind(P, first[1], rid, mid) and 1 or 0
    end
    first = redis.call('ZRANGEBYSCORE', Q .. 'q', 0, '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
    if not first[1] then return nil end
  end
  local set = redis.call('HMGET', Q .. 'v', 'w', 'a', 'u')
  local window, age_ms, usual_ms = tonumber(set[1]), tonumber(set[2]), tonumber(set[3] or '0')
  local b = next_band(Q, tonumber(first[2]), now_ms, age_ms)
  local old = overdue(P, Q, b, first[1], tonumber(first[2]), now_ms, patience(age_ms, usual_ms), window)
  local requests = old and {old} or heads(Q, b, window)
  if share then
    requests = of_share(share, requests)
    if #requests == 0 then return false end
  end
  local best, adm, best_n = choose(P, rid, requests)
  if not best then -- in no flow: only possible after keys were lost; it must not stop the others
    local from, to = string.format('%.0f', b * BAND_SPAN), string.format('%.0f', (b + 1) * BAND_SPAN - 1)
    redis.call('ZREM', Q .. 'q', redis.call('ZRANGEBYSCORE', Q .. 'q', from, to, 'LIMIT', 0, 1)[1])
    return 0
  end
  local id = best[4]
  if not adm then
    leave(P, did, id, {b, 100, 100, 100, best[3], best[2], best[1]}, 0)
    return 0
  end
  local f, n_in, n_cached = flow_of(adm), adm[IN_EST], 0
  f[1] = b
  if best_n > 0 and string.byte(adm[PFX]) == MARK then best_n = best_n - 1 end -- an adapter is no prompt
  if best_n > 0 then n_cached = math.min(n_in, PREFIX_TOKENS * 2 ^ (best_n - 1)) end
  local tenths = service(n_in, n_cached, adm[PRED])
  if not bind(P, id, rid, mid, tenths) then
    leave(P, did, id, f, 0)
    return 0
  end
  leave(P, did, id, f, tenths)
  note_prefixes(P, rid, adm[PFX], now_ms)
  local waited_ms = math.max(now_ms - adm[ADM_MS], 0)
  redis.call('HSET', Q .. 'v', 'u', usual_ms + math.floor((waited_ms - usual_ms) / WAIT_SHARE))
  return 1
end

local function fill(P, did, now_ms)
  local n_bound, free = 0, redis.call('SMEMBERS', P .. 'dep:' .. did .. ':reps')
  table.sort(free)
  while #free > 0 do
    local still = {}
    for _, rid in ipairs(free) do
      local mid, n_free = with_slot(P, rid)
      if mid then
        local got = dispatch(P, did, rid, mid, now_ms)
        if got == nil then return n_bound end
        if got then
          n_bound = n_bound + got
          if n_bound >= MAX_BOUND then return n_bound end
          if n_free > got then still[#still + 1] = rid end
        end
      end
    end
    free = still
  end
  return n_bound
end

-- Binds waiting requests while a replica of the deployment has a free slot, one a round and replica by id, so that a
-- burst is spread; returns how many. Bounded per call.
local function pump(P, did, now_ms)
  write_replicas()
  replicas = {} -- what comes now goes by what is written
  local n_bound = fill(P, did, now_ms)
  write_replicas()
  return n_bound
end

-- A replica of those that only take what would wait too long (dep:<did>:ovf), with a free slot: it, its machine, how many
-- are free. Asked where a request would be refused or find nobody.
local function overflow_slot(P, did)
  local over = redis.call('SMEMBERS', P .. 'dep:' .. did .. ':ovf')
  table.sort(over)
  for _, rid in ipairs(over) do
    local mid, n_free = with_slot(P, rid)
    if mid then return rid, mid, n_free end
  end
  return nil, nil, 0
end

-- Gives overflow replicas what has waited too long: while somebody of the lowest band that waits has done so for a
-- replica's `after` ms, or no other replica is there, it takes the next by the fair order (whoever that is).
-- Returns how many; bounded per call.
local function spill(P, did, now_ms)
  local Q, n_bound = P .. 'dep:' .. did .. ':', 0
  local over = redis.call('SMEMBERS', Q .. 'ovf')
  if #over == 0 then return 0 end
  table.sort(over)
  write_replicas()
  replicas = {}
  local is_alone = redis.call('SCARD', Q .. 'reps') == 0
  for _, rid in ipairs(over) do
    local mid, n_free = with_slot(P, rid)
    local after_ms = tonumber(redis.call('HGET', replica_of(P, rid).key, 'after') or '0')
    while mid and n_free > 0 and n_bound < MAX_BOUND do
      local oldest = redis.call('ZRANGEBYSCORE', Q .. 'q', 0, '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
      if not oldest[1] then break end
      local score = tonumber(oldest[2])
      if not is_alone and now_ms - (score - math.floor(score / BAND_SPAN) * BAND_SPAN) < after_ms then break end
      local got = dispatch(P, did, rid, mid, now_ms)
      if not got then break end
      n_bound, n_free = n_bound + got, n_free - got
    end
  end
  write_replicas()
  return n_bound
end
