-- The client has gone. A queued request is taken out (the caller then settles it at zero); a bound one is marked, so
-- that its next flush is told, and its replica is told at once.
-- ARGV: 1 cell prefix, 2 now_ms, 3 request, 4 gateway, 5 stream: who gives it up. Whoever is late, because a client has
-- reconnected through another gateway or on another stream, changes nothing. Without 4 and 5 nobody is asked.
-- Returns 'queued' | 'bound' | 'done' | 'moved' | 'unknown'.
local P, id = ARGV[1], ARGV[3]
local rec_key = P .. 'req:' .. id
local r = redis.call('HMGET', rec_key, 'state', 'adm', 'rid', 'mid', 'gw', 'stream')
if not r[1] then return 'unknown' end
if r[1] == 'done' then return 'done' end
if ARGV[4] and (r[5] ~= ARGV[4] or r[6] ~= ARGV[5]) then return 'moved' end
redis.call('HSET', rec_key, 'cancel', 1) -- a reconnect waits for the end of what is ending (attach.lua)
if r[1] == 'queued' then
  local adm = admitted(r[2], rec_key)
  leave(P, adm[DEP], id, flow_of(adm), 0)
  return 'queued'
end
local M = P .. 'm:' .. r[4] .. ':'
if redis.call('EXISTS', M .. 'req:' .. id) == 1 then redis.call('HSET', M .. 'req:' .. id, 'cancel', 1, 'open', '') end
redis.call('PUBLISH', M .. 'ctl:' .. r[3], id)
return 'bound'
