-- Ends a request once, whoever calls first (gateway at the last frame, intake after booking, reaper for the dead):
-- holds go back, actual use is charged, the slot is freed and the fair queue pumped. Later calls change nothing.
--
-- ARGV: 1 cell prefix, 2 now_ms, 3 request, 4 prompt tokens, 5 output tokens, 6 cost (nano), 7 retention_ms,
--       8 prompt tokens found cached (optional).
-- Returns {1, bound} when this call settled it, {0} when it was settled before or is unknown.
local UNREACHABLE_JOURNAL_MS = 30000
local P, now, id = ARGV[1], tonumber(ARGV[2]), ARGV[3]
local rec_key = P .. 'req:' .. id
local r = redis.call('HMGET', rec_key, 'state', 'dep', 'key', 'prj', 'org', 'in_est', 'out_est', 'money', 'caps',
  'rid', 'mid', 'fq', 'chg', 'adm_ms', 'asks', 'note')
if not r[1] or r[1] == 'done' then return {0} end
local did = r[2]
local back_in, back_out = tonumber(r[6]) - tonumber(ARGV[4]), tonumber(r[7]) - tonumber(ARGV[5])
local caps = caps_of(r[9])
local took_ms = r[14] and math.max(now - tonumber(r[14]), 0)
for s = 1, 3 do
  local h = scope_key(P, s, r[s + 2])
  local itpm, otpm, budget = caps[s * 3 - 2], caps[s * 3 - 1], caps[s * 3]
  local v = read_scope(h)
  local set = {'conc', math.max(tonumber(v[5] or '0') - 1, 0)}
  if took_ms then
    local dur = tonumber(v[8] or took_ms)
    set[3], set[4] = 'dur', math.floor(dur + (took_ms - dur) / 8)
  end
  -- Refunds lift the level as it stood at ms; whoever reads it next refills and clamps.
  if itpm >= 0 and v[2] then
    set[#set + 1] = 'in'
    set[#set + 1] = tonumber(v[2]) + back_in
  end
  if otpm >= 0 and v[3] then
    set[#set + 1] = 'out'
    set[#set + 1] = tonumber(v[3]) + back_out
  end
  if budget >= 0 then
    put_money(h, set, 'held', v[7] or '0', -tonumber(r[8]))
    if r[15] == '1' then redis.call('HINCRBY', h, 'ask', -1) end
  end
  -- Only a seeded counter is charged: an absent one is seeded from the ledger, which has this request by then.
  if v[6] then put_money(h, set, 'spent', v[6], tonumber(ARGV[6])) end
  put_scope(h, set)
end
if r[1] == 'queued' then
  leave(P, did, id, flow_of(r[12], r[3], r[4], r[5]), 0)
  redis.call('DEL', P .. 'body:' .. id)
  redis.call('PEXPIRE', P .. 'jrn:' .. id, ARGV[7])
end
if r[10] and r[10] ~= '' then
  free_slot(P, id, r[10])
  local M = P .. 'm:' .. r[11] .. ':'
  redis.call('DEL', M .. 'body:' .. id)
  -- A note without a digest: nothing leads back to it, and its gateway fills a gap within seconds, if at all.
  if r[16] and string.sub(r[16], -1) == ':' then redis.call('PEXPIRE', M .. 'jrn:' .. id, UNREACHABLE_JOURNAL_MS) end
  -- was_mid: where the journal of a finished request still lies.
  redis.call('HSET', rec_key, 'state', 'done', 'rid', '', 'mid', '', 'was_mid', r[11])
else
  redis.call('HSET', rec_key, 'state', 'done')
end
redis.call('PEXPIRE', rec_key, ARGV[7])
local waits = redis.call('EXISTS', P .. 'dep:' .. did .. ':q') == 1
local charged = tonumber(r[13] or '0')
if waits or charged > 0 then -- else it took nothing that anybody waited for
  local used = service(tonumber(ARGV[4]), tonumber(ARGV[8] or '0'), tonumber(ARGV[5]))
  if used ~= charged then charge(P, did, flow_of(r[12], r[3], r[4], r[5]), charged, used, waits) end
end
return {1, waits and pump(P, did, now) or 0}
