-- Run by a replica that hands a claimed attempt back unharmed (drain, or a restart of the attempt after a gap): the
-- lease is unclaimed again, so that flushes still under way are refused and a later death does not count against
-- the request. Only keys under the machine's prefix.
-- ARGV: 1 machine prefix, 2 request, 3 epoch. Returns 1 when it was claimed under this epoch, else 0.
local k = ARGV[1] .. 'req:' .. ARGV[2]
local r = redis.call('HMGET', k, 'epoch', 'state')
if r[1] ~= ARGV[3] or r[2] ~= 'claimed' then return 0 end
redis.call('HSET', k, 'state', 'bound', 'open', '')
return 1
