-- A client comes back for a request it began: where that stands, and, if it still runs, from now on its tokens go to
-- this gateway and stream (the last to ask wins). A request that was cancelled may have been continued by another one:
-- `next` in its record names that, and everything is asked of the latest.
--
-- ARGV: 1 cell prefix, 2 now_ms, 3 request as the client knows it, 4 project of the key, 5 digest of the body ('' = no
--       body was sent), 6 gateway, 7 stream, 8 how long an admission may take, ms, 9 deployments that the key may call
--       ('' = every one of the project).
-- Returns {'unknown'} (also when it is another project's) | {'differs'} (another body) | {'busy'} (a continuation is
-- being admitted) | {verdict, request, note, admitted_ms, machine, deployment, price version, first admitted_ms, gateway,
-- stream, tokens, error, age}, where verdict is 'running' or 'queued' (attached; gateway and stream had it before), 'ending'
-- (not over yet), 'done'; machine: where its journal lies, '' = never on one; tokens: in the journal of what is attached;
-- error: why nobody served it, '' = it ended otherwise; age: ms since its admission while it runs or waits, by the clock of
-- Redis (that of the gateway that admitted it may be wrong).
local RECORD_LIFE_MS = 21600000 -- from its admission (LEASE_GC_MS) until it is settled
local P, now, id = ARGV[1], tonumber(ARGV[2]), ARGV[3]
local first = redis.call('HMGET', P .. 'req:' .. id, 'adm', 'next', 'next_ms', 'prev')
local first_adm = admitted(first[1], P .. 'req:' .. id)
if not first_adm or first_adm[PRJ] ~= ARGV[4] then return {'unknown'} end
if (ARGV[9] or '') ~= '' and not string.find(ARGV[9], first_adm[DEP], 1, true) then return {'unknown'} end
if ARGV[5] ~= '' and string.match(first_adm[NOTE], '^%a*:(%x*)') ~= ARGV[5] then return {'differs'} end

local function read(request)
  return redis.call('HMGET', P .. 'req:' .. request, 'state', 'adm', 'mid', 'was_mid', 'gw', 'stream', 'rid', 'cancel',
    'error', 'n')
end

if first[2] then id = first[2] end
local r = read(id)
if not r[1] then
  if now - tonumber(first[3]) < tonumber(ARGV[8]) then return {'busy'} end
  id = first[4] -- its gateway died before it was admitted
  r = read(id)
  if not r[1] then return {'unknown'} end
end

local adm, mid = admitted(r[2], P .. 'req:' .. id), r[3] or ''
local function answer(verdict, machine, n)
  local left_ms = redis.call('PTTL', P .. 'req:' .. id)
  local age_ms = left_ms > 0 and math.max(RECORD_LIFE_MS - left_ms, 0) or 0
  return {verdict, id, adm[NOTE], string.format('%.0f', adm[ADM_MS]), machine, adm[DEP], adm[PRICE],
    string.format('%.0f', first_adm[ADM_MS]), r[5], r[6], n or '0', r[9] or '', string.format('%.0f', age_ms)}
end

if r[1] == 'done' or (r[1] == 'bound' and mid == '') then return answer('done', mid ~= '' and mid or r[4] or '') end
if r[1] == 'queued' then
  if r[8] or r[9] then return answer('ending', '') end
  redis.call('HSET', P .. 'req:' .. id, 'gw', ARGV[6], 'stream', ARGV[7])
  return answer('queued', '', r[10])
end
local M = P .. 'm:' .. mid .. ':'
local lease = redis.call('HMGET', M .. 'req:' .. id, 'state', 'cancel', 'n')
if lease[1] == 'done' then return answer('done', mid) end -- over, not settled yet
if lease[2] or r[8] then return answer('ending', mid) end
redis.call('HSET', P .. 'req:' .. id, 'gw', ARGV[6], 'stream', ARGV[7])
if lease[1] then
  -- Read again by its replica: told now, and by the mark at its next flush should the word be lost.
  redis.call('HSET', M .. 'req:' .. id, 'gw', ARGV[6], 'stream', ARGV[7], 'moved', 1, 'open', '')
  redis.call('PUBLISH', M .. 'ctl:' .. r[7], '@' .. id)
end
return answer('running', mid, lease[3])
