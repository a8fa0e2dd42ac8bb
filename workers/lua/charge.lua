-- Long answers are charged as they are produced: a request that has put out more than was expected of it counts with
-- what it has put out. The exact counts follow at its settle. Run by gateways, a few times a second for all streams.
-- ARGV: 1 cell prefix, then per request 2: id, output tokens produced. Returns how many charges grew. Bounded by the
-- caller: some hundred requests a call.
local P, n_grown = ARGV[1], 0
for i = 2, #ARGV, 2 do
  local rec_key = P .. 'req:' .. ARGV[i]
  local r = redis.call('HMGET', rec_key, 'state', 'dep', 'key', 'prj', 'org', 'fq', 'chg', 'pred')
  local more = tonumber(ARGV[i + 1]) - tonumber(r[8] or '0')
  if (r[1] == 'bound' or r[1] == 'queued') and more > 0 then
    local before = tonumber(r[7])
    local waits = redis.call('EXISTS', P .. 'dep:' .. r[2] .. ':q') == 1
    charge(P, r[2], flow_of(r[6], r[3], r[4], r[5]), before, before + 20 * more, waits, false)
    redis.call('HSET', rec_key, 'chg', before + 20 * more, 'pred', ARGV[i + 1])
    n_grown = n_grown + 1
  end
end
return n_grown
