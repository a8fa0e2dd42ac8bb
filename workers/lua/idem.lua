-- An idempotency key names one request of a project. Taken before admission; the record of the request then proves that
-- it was admitted. A key whose request never was (its gateway died in between) is free again after a while.
-- ARGV: 1 cell prefix, 2 now_ms, 3 project, 4 digest of the key, 5 request, 6 life of the key, ms, 7 how long an
--       admission may take, ms.
-- Returns {'taken'} | {'known', request} | {'busy', ms until it is free again}.
local P, now = ARGV[1], tonumber(ARGV[2])
local k = P .. 'idem:' .. ARGV[3] .. ':' .. ARGV[4]
local held = redis.call('GET', k)
if held then
  local id, at_ms = string.match(held, '^(%S+) (%d+)$')
  if redis.call('EXISTS', P .. 'req:' .. id) == 1 then
    redis.call('PEXPIRE', k, ARGV[6])
    return {'known', id}
  end
  local left_ms = tonumber(at_ms) + tonumber(ARGV[7]) - now
  if left_ms > 0 then return {'busy', left_ms} end
end
redis.call('SET', k, ARGV[5] .. ' ' .. ARGV[2], 'PX', ARGV[6])
return {'taken'}
