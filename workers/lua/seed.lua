-- Sets a scope's booked money from the ledger, unless somebody was first. Live holds are re-taken by settle/admit.
-- ARGV: 1 cell prefix, 2 scope, 3 scope id, 4 spent (nano). Returns 1 when set.
return redis.call('HSETNX', ARGV[1] .. 'lim:' .. ARGV[2] .. ':' .. ARGV[3], 'spent', ARGV[4])
