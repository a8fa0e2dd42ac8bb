-- Usage was booked of a request that this Redis has lost (emptied, or back without the end of its log), so that no
-- settlement can charge it: it is added to what its scopes have spent, unless the ledger said so when they were seeded.
-- ARGV: 1 cell prefix, 2 instant just before it was booked, 3 cost (nano), 4 key, 5 project, 6 organization,
--       7 end customer (as admit.lua names its scope; '' or none: it named none).
-- Returns how many scopes were charged.
local P, n = ARGV[1], 0
for s = (ARGV[7] or '') ~= '' and 0 or 1, 3 do
  local scope = scope_of(P, s, ARGV[s == 0 and 7 or s + 3])
  if scope.spent and tonumber(redis.call('HGET', scope.key, 'seed_ms') or '0') <= tonumber(ARGV[2]) then
    put_money(scope, 'spent', tonumber(ARGV[3]))
    n = n + 1
  end
end
write_scopes()
return n
