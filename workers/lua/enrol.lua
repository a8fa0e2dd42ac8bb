-- A replica is ready (or changed its slots): it joins its deployment's set and takes what waits.
-- ARGV: 1 cell prefix, 2 now_ms, 3 replica, 4 machine, 5 deployment, 6 slots, 7 tokens that its KV memory
-- holds (absent or 0: not said), 8 what it is where it is an endpoint elsewhere ('replica' or 'overflow'; absent: none),
-- 9 after how many ms of waiting an overflow takes a request, 10 what a token there costs to routing, as a factor.
-- 11 of a canary: its share of the requests, of 65,536 (absent or '': no canary, or as it was),
-- 12 how fast it should be (controlplane/policy/pace.py: Speed; absent or '': nobody can tell).
-- Returns how many requests it was given.
local P, now, rid, did = ARGV[1], tonumber(ARGV[2]), ARGV[3], ARGV[5]
redis.call('HSET', P .. 'rep:' .. rid, 'mid', ARGV[4], 'dep', did, 'state', 'ready', 'slots', ARGV[6])
if tonumber(ARGV[7] or 0) > 0 then redis.call('HSET', P .. 'rep:' .. rid, 'kv', ARGV[7]) end
if (ARGV[11] or '') ~= '' then redis.call('HSET', P .. 'rep:' .. rid, 'share', ARGV[11]) end
if (ARGV[12] or '') ~= '' then redis.call('HSET', P .. 'rep:' .. rid, 'pace', ARGV[12]) end
redis.call('HSETNX', P .. 'rep:' .. rid, 'used', 0)
local set, other = 'reps', 'ovf'
if (ARGV[8] or '') ~= '' then
  redis.call('HSET', P .. 'rep:' .. rid, 'ext', '1', 'after', ARGV[9], 'price', ARGV[10])
  if ARGV[8] == 'overflow' then set, other = 'ovf', 'reps' end
  redis.call('SREM', P .. 'dep:' .. did .. ':' .. other, rid)
end
redis.call('SADD', P .. 'dep:' .. did .. ':' .. set, rid)
redis.call('PUBLISH', P .. 'route', did)
if set == 'ovf' then return spill(P, did, now) end
return pump(P, did, now)
