-- Run by a replica for delivered messages: may it serve these attempts? Only keys under the machine's prefix.
-- ARGV: 1 machine prefix, 2 now_ms, 3 request, 4 epoch, 5 replica, then more pairs of request and epoch (at most 64).
-- Returns {'ok', body, gateway, stream, n, hold, attempt, journal entries...} | {'held'|'stale'|'done'|'cancelled'}:
-- of the one request, or an array of such answers in the order asked.
local M = ARGV[1]

local function claim(id, epoch)
  local k = M .. 'req:' .. id
  local r = redis.call('HMGET', k, 'epoch', 'state', 'gw', 'stream', 'n', 'upto', 'cancel', 'attempt', 'moved')
  if r[1] ~= epoch then return {'stale'} end
  if r[2] == 'done' then return {'done'} end
  if r[2] == 'claimed' then return {'held'} end
  redis.call('HSET', k, 'state', 'claimed', 'open', not (r[7] or r[9]) and epoch or '')
  if r[7] then return {'cancelled', '', r[3], r[4], r[5], r[6] - r[5], r[8]} end
  local body = redis.call('GET', M .. 'body:' .. id)
  if not body then return {'stale'} end
  local out = {'ok', body, r[3], r[4], r[5], r[6] - r[5], r[8]}
  if r[5] ~= '0' then
    for _, e in ipairs(redis.call('LRANGE', M .. 'jrn:' .. id, 0, -1)) do out[#out + 1] = e end
  end
  return out
end

local first = claim(ARGV[3], ARGV[4])
if #ARGV == 5 then return first end
local out = {first}
for i = 6, #ARGV, 2 do out[#out + 1] = claim(ARGV[i], ARGV[i + 1]) end
return out
