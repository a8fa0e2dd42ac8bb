-- Long answers are charged as they are produced: a request that has put out more than was expected of it counts with
-- what it has put out; and its prompt, if it was bound without waiting, nothing was charged so far and somebody waits
-- now. The exact counts follow at its settle. Run by gateways, a few times a second for all streams.
-- ARGV: 1 cell prefix, then per request 2: id, output tokens produced. Returns how many charges grew. Bounded by the
-- caller: some hundred requests a call.
local P, n_grown = ARGV[1], 0
for i = 2, #ARGV, 2 do
  local rec_key = P .. 'req:' .. ARGV[i]
  local r = redis.call('HMGET', rec_key, 'state', 'adm', 'chg', 'pred')
  local adm = r[1] and admitted(r[2], rec_key)
  local more = adm and tonumber(ARGV[i + 1]) - tonumber(r[4] or adm[PRED])
  if (r[1] == 'bound' or r[1] == 'queued') and more > 0 then
    local before = tonumber(r[3] or '0')
    local waits = redis.call('EXISTS', P .. 'dep:' .. adm[DEP] .. ':q') == 1
    if waits or before > 0 then
      local after = before > 0 and before + 20 * more or service(adm[IN_EST], 0, tonumber(ARGV[i + 1]))
      charge(P, adm[DEP], flow_of(adm), before, after, waits)
      redis.call('HSET', rec_key, 'chg', after, 'pred', ARGV[i + 1])
      n_grown = n_grown + 1
    end
  end
end
return n_grown
