-- Included by admission and settlement: token buckets, concurrency and money holds of key, project and organization.
-- A scope's hash holds: rq, in, out (bucket levels), rq_ms, in_ms, out_ms (their instants), conc, held (nano-dollars
-- held), spent (nano-dollars booked since the budget began; absent until seeded from the ledger).

-- Level of a bucket of `cap` units a minute after refill; a bucket never seen is full.
local function level(h, name, cap, now_ms)
  local v = redis.call('HMGET', h, name, name .. '_ms')
  if not v[1] then return cap end
  local l = tonumber(v[1]) + (now_ms - tonumber(v[2])) * cap / 60000
  if l > cap then l = cap end
  return l
end

local function put_level(h, name, value, now_ms)
  redis.call('HSET', h, name, string.format('%.6f', value), name .. '_ms', string.format('%.0f', now_ms))
end
