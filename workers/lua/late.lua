-- Usage was booked of a request that this Redis has lost (emptied, or back without the end of its log), so that no
-- settlement can charge it: it is added to what its scopes have spent, unless the ledger said so when they were seeded.
-- ARGV: 1 cell prefix, 2 instant just before it was booked, 3 cost (nano), 4 key, 5 project, 6 organization.
-- Returns how many scopes were charged.
local P, n = ARGV[1], 0
for s = 1, 3 do
  local h, set = scope_key(P, s, ARGV[s + 3]), {}
  local v = redis.call('HMGET', h, 'spent', 'seed_ms')
  if v[1] and tonumber(v[2] or '0') <= tonumber(ARGV[2]) then
    put_money(h, set, 'spent', v[1], tonumber(ARGV[3]))
    if set[1] then redis.call('HSET', h, unpack(set)) end
    n = n + 1
  end
end
return n
