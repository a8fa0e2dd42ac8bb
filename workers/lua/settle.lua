-- Ends a request once, whoever calls first (gateway at the last frame, intake after booking, reaper for the dead):
-- holds go back, actual use is charged, the slot is freed and the fair queue pumped. Later calls change nothing.
-- Whoever calls this writes replicas and scopes at its end.
--
-- ARGV: 1 cell prefix, 2 now_ms, 3 request, 4 prompt tokens, 5 output tokens, 6 cost (nano), 7 retention_ms,
--       8 prompt tokens found cached (optional).
-- Returns {1, bound} when this call settled it, {0} when it was settled before or is unknown.
local UNREACHABLE_JOURNAL_MS = '30000'
local P, now, id = ARGV[1], tonumber(ARGV[2]), ARGV[3]
local rec_key = P .. 'req:' .. id
local r = redis.call('HMGET', rec_key, 'state', 'adm', 'rid', 'mid', 'money', 'chg', 'asks')
if not r[1] or r[1] == 'done' then return {0} end
local adm = admitted(r[2], rec_key)
local did, n_in, n_out, cost = adm[DEP], tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local back_in, back_out, money = adm[IN_EST] - n_in, adm[OUT_EST] - n_out, tonumber(r[5] or adm[MONEY])
local took_ms = math.max(now - adm[ADM_MS], 0)
for s = adm[ENDS] and 0 or 1, 3 do
  local scope_id, limits, caps = adm[KEY + s - 1], adm, CAPS + (s - 1) * 3
  if s == 0 then scope_id, limits, caps = adm[ENDS][1], adm[ENDS], 2 end
  local scope = scope_of(P, s, scope_id)
  put(scope, 'conc', math.max(scope.conc - 1, 0))
  local dur = scope.dur or took_ms
  put(scope, 'dur', math.floor(dur + (took_ms - dur) / 8))
  -- Refunds lift the level as it stood at ms; whoever reads it next refills and clamps.
  if limits[caps] >= 0 and scope['in'] then put(scope, 'in', scope['in'] + back_in) end
  if limits[caps + 1] >= 0 and scope.out then put(scope, 'out', scope.out + back_out) end
  if limits[caps + 2] >= 0 then
    put_money(scope, 'held', -money)
    if r[7] == '1' then redis.call('HINCRBY', scope.key, 'ask', -1) end
  end
  -- Only a seeded counter is charged: an absent one is seeded from the ledger, which has this request by then.
  if scope.spent then put_money(scope, 'spent', cost) end
end
if adm[WINDOWS] and adm[WINDOWS][1] then seldom().settle_windows(P, adm[WINDOWS], money, cost, r[7] == '1') end
if r[1] == 'queued' then
  seldom().leave(P, did, id, flow_of(adm), 0)
  redis.call('DEL', P .. 'body:' .. id)
  redis.call('PEXPIRE', P .. 'jrn:' .. id, ARGV[7])
end
if r[3] and r[3] ~= '' then
  free_slot(P, id, r[3])
  local M = P .. 'm:' .. r[4] .. ':'
  scraps[#scraps + 1] = M .. 'body:' .. id
  -- A note without a digest: nothing leads back to it, and its gateway fills a gap within seconds, if at all.
  if string.sub(adm[NOTE], -1) == ':' then redis.call('PEXPIRE', M .. 'jrn:' .. id, UNREACHABLE_JOURNAL_MS) end
  -- was_mid: where the journal of a finished request still lies.
  redis.call('HSET', rec_key, 'state', 'done', 'rid', '', 'mid', '', 'was_mid', r[4])
else
  redis.call('HSET', rec_key, 'state', 'done')
end
redis.call('PEXPIRE', rec_key, ARGV[7])
local waits = n_waiting(P, did) > 0
local charged = tonumber(r[6] or '0')
if waits or charged > 0 then -- else it took nothing that anybody waited for
  local used = service(n_in, tonumber(ARGV[8] or '0'), n_out)
  if used ~= charged then seldom().charge(P, did, flow_of(adm), charged, used, waits) end
end
return {1, waits and seldom().pump(P, did, now) + seldom().spill(P, did, now) or 0}
