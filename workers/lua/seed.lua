-- Sets a scope's booked money from the ledger, unless somebody was first. Live holds are re-taken by settle/admit.
-- seed_ms: what is booked later is not in that sum (late.lua).
-- Of an end customer among several cells also what the cell was leased of its money: a lease that admits only grows, so
-- of two answers that arrive in the other order the larger one counts.
-- ARGV: 1 cell prefix, 2 scope, 3 scope id, 4 spent (nano), 5 instant just before the ledger was asked; of a lease 6 what
--       may be spent here in all (nano), 7 until when it admits (ms), 8 until when it is no use to ask for more (ms),
--       9 what other cells have and have not used (nano). Returns 1 when the booked money was set.
local h = ARGV[1] .. 'lim:' .. ARGV[2] .. ':' .. ARGV[3]
local set = redis.call('HSETNX', h, 'spent', ARGV[4])
if set == 1 then redis.call('HSET', h, 'seed_ms', ARGV[5] or '0') end
if ARGV[2] == SCOPE[0] then redis.call('PEXPIRE', h, END_LIFE_MS) end -- also where the request is refused after all
if ARGV[6] then
  local known = redis.call('HMGET', h, 'lease', 'until')
  if tonumber(known[2] or '0') > tonumber(ARGV[5]) and tonumber(known[1]) > tonumber(ARGV[6]) then return set end
  redis.call('HSET', h, 'lease', ARGV[6], 'until', ARGV[7], 'dry', ARGV[8], 'rest', ARGV[9])
end
return set
