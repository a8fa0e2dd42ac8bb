-- A replica takes no new work. With mode 'drain' what it runs goes on; with 'dead' every request bound to it goes
-- back to the fair queue, ahead of those that never ran, its journal with it, under a lease that fences the old
-- holder out. A request that is blamed for more deaths than allowed is poison: it is failed, not tried again. With mode
-- 'lost' the replica stays as it is and only the named requests go back: their message was lost on the way to it.
--
-- Who is blamed for a death: those that the replica was serving and of which nothing was ever shown, where there are
-- such, since the others had long run when those came; else all but those that went on well since the death before. A
-- request that saw MOST_DEATHS is failed all the same, so that none that kills now and then goes on for ever.
--
-- ARGV: 1 cell prefix, 2 now_ms, 3 replica, 4 'drain' | 'dead' | 'lost', 5 deaths allowed, 6 what the client of poison is
--       told (WireError), 7.. requests ('lost').
-- Returns {n_requeued, n_left_running, n_given_up}. Bounded: 512 requests a call; call again while n_left_running > 0
-- with 'dead'.
local P, now, rid, mode = ARGV[1], tonumber(ARGV[2]), ARGV[3], ARGV[4]
local rk = P .. 'rep:' .. rid
local r = redis.call('HMGET', rk, 'dep', 'mid', 'ext')
if not r[1] then return {0, 0, 0} end
local did, M = r[1], P .. 'm:' .. r[2] .. ':'
if mode ~= 'lost' then
  redis.call('SREM', P .. 'dep:' .. did .. ':reps', rid)
  if r[3] then redis.call('SREM', P .. 'dep:' .. did .. ':ovf', rid) end
  redis.call('HSET', rk, 'state', mode == 'dead' and 'dead' or 'draining')
  redis.call('PUBLISH', P .. 'route', did)
end
local out = {0, 0, 0}
local MOST_DEATHS = 2 * (tonumber(ARGV[5] or '1') + 1)
local WENT_ON = 16 -- tokens: who makes as many between two deaths is not what ends replicas

-- Nobody will serve it: the reason stays in its record, where its gateway finds it, and the cell's `failed` set has
-- whoever watches tell the gateway and settle it, also if the one who found out dies before that.
local function give_up(id, error)
  redis.call('HSET', P .. 'req:' .. id, 'error', error or '')
  redis.call('SADD', P .. 'failed', id)
  out[3] = out[3] + 1
end

if mode ~= 'drain' then
  local ids = {}
  if mode == 'dead' then
    redis.call('DEL', M .. 'replica.' .. rid, M .. 'unacked.' .. rid, M .. 'unacked_index.' .. rid)
    ids = redis.call('SRANDMEMBER', rk .. ':live', 512)
  else
    for i = 7, #ARGV do
      if redis.call('SISMEMBER', rk .. ':live', ARGV[i]) == 1 then ids[#ids + 1] = ARGV[i] end
    end
  end
  local served, n_fresh = {}, 0
  if mode == 'dead' then
    for _, id in ipairs(ids) do
      local lease = redis.call('HMGET', M .. 'req:' .. id, 'state', 'n')
      if lease[1] == 'claimed' then
        served[id] = tonumber(lease[2] or '0')
        if served[id] == 0 then n_fresh = n_fresh + 1 end
      end
    end
  end
  -- (deaths it is blamed for, deaths it saw) with this one. One that lay in the dead queue saw none.
  local function deaths_of(id)
    local n = served[id]
    if not n then return 0, 0 end
    local rec_key = P .. 'req:' .. id
    local seen = redis.call('HINCRBY', rec_key, 'deaths', 1)
    local last_n = tonumber(redis.call('HGET', rec_key, 'death_n') or '-1')
    redis.call('HSET', rec_key, 'death_n', n)
    if n_fresh > 0 and n > 0 then return 0, seen end
    if last_n >= 0 and n - last_n >= WENT_ON then return 0, seen end
    return redis.call('HINCRBY', rec_key, 'crashes', 1), seen
  end
  for i, id in ipairs(ids) do
    local lease_state = redis.call('HGET', M .. 'req:' .. id, 'state')
    if redis.call('HGET', P .. 'req:' .. id, 'state') ~= 'bound' then
      free_slot(P, id, rid)
    elseif lease_state == 'done' then
      -- Finished before it died; its usage is in the stream or the spool and will be settled by intake.
      if mode == 'dead' then unbind(P, id, false) end
    else
      unbind(P, id, true)
      local blamed, seen = deaths_of(id)
      redis.call('HSET', P .. 'req:' .. id, 'state', 'queued')
      local rec = redis.call('HMGET', P .. 'req:' .. id, 'n', 'cancel', 'adm')
      if blamed > tonumber(ARGV[5]) or seen >= MOST_DEATHS then
        give_up(id, ARGV[6])
      elseif r[3] and (rec[1] or '0') ~= '0' then -- an endpoint elsewhere began it: of its tokens nobody has ids
        give_up(id, rec[2] and '' or cmsgpack.pack({503, 'cannot_continue',
          'the answer was interrupted and cannot be continued exactly (because of upstream): send it again'}))
      elseif rec[2] and (rec[1] or '0') == '0' then
        give_up(id, '') -- its client has left, and nothing was made that could be charged
      else
        -- Resumed work goes first, outside the flows: it was charged when it was first bound.
        local adm = admitted(rec[3], P .. 'req:' .. id)
        local adm_ms = adm and adm[ADM_MS] or 0
        redis.call('ZADD', P .. 'dep:' .. did .. ':q', string.format('%.0f', adm_ms - 1e13), id)
        out[1] = out[1] + 1
      end
    end
  end
  write_replicas()
  if mode == 'dead' then redis.call('DEL', rk .. ':px') end
  if mode == 'dead' and redis.call('SCARD', rk .. ':live') == 0 then redis.call('PEXPIRE', rk, 900000) end
  if out[1] > 0 or mode == 'lost' then
    pump(P, did, now)
    if out[1] > 0 and redis.call('SCARD', P .. 'dep:' .. did .. ':reps') == 0 then redis.call('PUBLISH', P .. 'wake', did) end
  end
end
out[2] = redis.call('SCARD', rk .. ':live')
return out
