-- A replica's slots change while it serves; what waits takes those that were added. More requests may run than there
-- are slots for a while: they finish, none is taken off. Compare-and-set on the slots that the decision was made of.
-- ARGV: 1 cell prefix, 2 now_ms, 3 replica, 4 slots as decided upon, 5 slots from now on, 6 why (one sentence).
-- Returns how many requests it was given, -1 when it does not take new work or has other slots by now.
local P, now, rid = ARGV[1], tonumber(ARGV[2]), ARGV[3]
local key = P .. 'rep:' .. rid
local r = redis.call('HMGET', key, 'state', 'slots', 'dep')
if r[1] ~= 'ready' or r[2] ~= ARGV[4] then return -1 end
redis.call('HSET', key, 'slots', ARGV[5], 'why', string.sub(ARGV[6], 1, 200), 'why_ms', ARGV[2])
redis.call('PUBLISH', P .. 'route', r[3])
if tonumber(ARGV[5]) > tonumber(ARGV[4]) then return pump(P, r[3], now) end
return 0
