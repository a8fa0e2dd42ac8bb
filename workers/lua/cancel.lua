-- The client has gone. A queued request is taken out (the caller then settles it at zero); a bound one is marked, so
-- that its next flush is told, and its replica is told at once.
-- ARGV: 1 cell prefix, 2 now_ms, 3 request. Returns 'queued' | 'bound' | 'done' | 'unknown'.
local P, id = ARGV[1], ARGV[3]
local r = redis.call('HMGET', P .. 'req:' .. id, 'state', 'dep', 'rid', 'mid')
if not r[1] then return 'unknown' end
if r[1] == 'done' then return 'done' end
if r[1] == 'queued' then
  redis.call('ZREM', P .. 'dep:' .. r[2] .. ':q', id)
  return 'queued'
end
local M = P .. 'm:' .. r[4] .. ':'
if redis.call('EXISTS', M .. 'req:' .. id) == 1 then redis.call('HSET', M .. 'req:' .. id, 'cancel', 1) end
redis.call('PUBLISH', M .. 'ctl:' .. r[3], id)
return 'bound'
