-- Sets what a window budget has spent in its present window from the ledger, unless somebody was first. What runs under
-- a window that was cut otherwise keeps its hold there and counts in the present one once it is booked (true_up.lua).
-- ARGV: 1 cell prefix, 2 budget, 3 start of the window (of a rolling budget: of its latest bucket), 4 its end, both ms,
--       5 width of a bucket (ms; 0: of the calendar), 6 n_buckets, 7 life_ms of the counter,
--       8.. pairs: start of a bucket (any, where of the calendar), spent in it (nano). Returns 1 when set.
local key = ARGV[1] .. 'bud:' .. ARGV[2]
local v = redis.call('HMGET', key, 'win', 'end', 'spent', 'held', 'n', 'ask')
if v[3] and v[1] == ARGV[3] and v[2] == ARGV[4] then return 0 end
if v[3] and v[1] ~= ARGV[3] then
  redis.call('HSET', key, 'pwin', v[1], 'pspent', v[3], 'pheld', v[4] or 0, 'pn', v[5] or 0, 'pask', v[6] or 0)
end
redis.call('HSET', key, 'win', ARGV[3], 'end', ARGV[4], 'spent', 0, 'held', 0, 'n', 0, 'ask', 0)
redis.call('DEL', key .. ':b')
for i = 8, #ARGV, 2 do
  redis.call('HINCRBY', key, 'spent', ARGV[i + 1])
  if ARGV[5] ~= '0' then redis.call('HINCRBY', key .. ':b', ARGV[i], ARGV[i + 1]) end
end
redis.call('PEXPIRE', key, ARGV[7])
redis.call('PEXPIRE', key .. ':b', ARGV[7])
return 1
