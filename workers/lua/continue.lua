-- A cancelled request is continued by a new one: its journal is copied without the end, and the first request's record
-- names its successor, once. The new request is admitted next, by the same gateway; should that be refused,
-- retract.lua undoes this.
-- ARGV: 1 cell prefix, 2 now_ms, 3 request as the client knows it, 4 the one to continue, 5 the new one, 6 key of the
--       journal to copy ('' = nothing was produced), 7 1 = its last entry holds the end, 8 what that entry holds
--       besides ('' = nothing), 9 life of the first record, ms, 10 how long an admission may take, ms.
-- Returns 'ok' | 'busy' (somebody else continues it) | 'gone' (the journal was dropped meanwhile).
local P, now = ARGV[1], tonumber(ARGV[2])
local rec_key, copy = P .. 'req:' .. ARGV[3], P .. 'jrn:' .. ARGV[5]
if redis.call('EXISTS', rec_key) == 0 then return 'gone' end
local r = redis.call('HMGET', rec_key, 'next', 'next_ms')
if (r[1] or ARGV[3]) ~= ARGV[4] then
  local is_admitted = redis.call('EXISTS', P .. 'req:' .. r[1]) == 1
  if is_admitted or now - tonumber(r[2]) < tonumber(ARGV[10]) then return 'busy' end
end
if ARGV[6] ~= '' then
  if redis.call('COPY', ARGV[6], copy) == 0 then return 'gone' end
  if ARGV[7] == '1' then redis.call('RPOP', copy) end
  if ARGV[8] ~= '' then redis.call('RPUSH', copy, ARGV[8]) end
  redis.call('PEXPIRE', copy, 10 * tonumber(ARGV[10])) -- admission lifts this; what is never admitted leaves nothing
end
redis.call('HSET', rec_key, 'next', ARGV[5], 'prev', ARGV[4], 'next_ms', now)
redis.call('PEXPIRE', rec_key, ARGV[9])
return 'ok'
