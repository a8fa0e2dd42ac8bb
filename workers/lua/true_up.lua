-- The ledger knows more than a window's counter: of requests that ran before the budget was there, or that this Redis
-- lost. What is booked and not yet settled is held with at least its cost, so only the excess over both is missing, and
-- adding it never counts a request twice.
-- ARGV: 1 cell prefix, 2 budget, 3 start of the window (of a rolling budget: of its latest bucket), 4 width of a bucket
--       (ms; 0: of the calendar), 5 booked in the window (nano). Returns what was added.
local key = ARGV[1] .. 'bud:' .. ARGV[2]
local v = redis.call('HMGET', key, 'win', 'spent', 'held')
if v[1] ~= ARGV[3] or not v[2] then return 0 end
local missing = tonumber(ARGV[5]) - tonumber(v[2]) - tonumber(v[3] or '0')
if missing <= 0 then return 0 end
redis.call('HINCRBY', key, 'spent', string.format('%.0f', missing))
if ARGV[4] ~= '0' then redis.call('HINCRBY', key .. ':b', ARGV[3], string.format('%.0f', missing)) end
return missing
