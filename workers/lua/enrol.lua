-- A replica is ready (or changed its slots): it joins its deployment's set and takes what waits.
-- ARGV: 1 cell prefix, 2 now_ms, 3 replica, 4 machine, 5 deployment, 6 slots, 7 tokens that its KV memory
-- holds (absent or 0: not said). Returns how many requests it was given.
local P, now, rid, did = ARGV[1], tonumber(ARGV[2]), ARGV[3], ARGV[5]
redis.call('HSET', P .. 'rep:' .. rid, 'mid', ARGV[4], 'dep', did, 'state', 'ready', 'slots', ARGV[6])
if tonumber(ARGV[7] or 0) > 0 then redis.call('HSET', P .. 'rep:' .. rid, 'kv', ARGV[7]) end
redis.call('HSETNX', P .. 'rep:' .. rid, 'used', 0)
redis.call('SADD', P .. 'dep:' .. did .. ':reps', rid)
redis.call('PUBLISH', P .. 'route', did)
return pump(P, did, now)
