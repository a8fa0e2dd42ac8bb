-- Sets a scope's booked money from the ledger, unless somebody was first. Live holds are re-taken by settle/admit.
-- seed_ms: what is booked later is not in that sum (late.lua).
-- ARGV: 1 cell prefix, 2 scope, 3 scope id, 4 spent (nano), 5 instant just before the ledger was asked. Returns 1 when set.
local h = ARGV[1] .. 'lim:' .. ARGV[2] .. ':' .. ARGV[3]
local set = redis.call('HSETNX', h, 'spent', ARGV[4])
if set == 1 then redis.call('HSET', h, 'seed_ms', ARGV[5] or '0') end
if ARGV[2] == SCOPE[0] then redis.call('PEXPIRE', h, END_LIFE_MS) end -- also where the request is refused after all
return set
