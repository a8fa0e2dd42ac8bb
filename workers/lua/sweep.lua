-- Forgets counters of flows at or below where a newcomer to their level starts: they say no more than none would.
-- Run by the watcher now and then, in steps, so that a deployment's memory stays with those that use it.
-- ARGV: 1 cell prefix, 2 now_ms, 3 deployment, 4 cursor ('0' first), 5 fields a step. Returns {next cursor, n forgotten}.
local Q = ARGV[1] .. 'dep:' .. ARGV[3] .. ':'
redis.call('PEXPIRE', Q .. 'v', 604800000) -- a deployment that is no more is swept no more, either
local step, n = redis.call('HSCAN', Q .. 'v', ARGV[4], 'COUNT', ARGV[5]), 0
for i = 1, #step[2], 2 do
  local b, kind, name = string.match(step[2][i], '^(%d+)([opk])(.+)$')
  if b then
    local zset, left = Q .. 'o:' .. b, b .. 'O'
    if kind ~= 'o' then
      local parent
      parent, name = string.match(name, '^(.-):(.+)$')
      zset, left = Q .. kind .. ':' .. b .. ':' .. parent, b .. string.upper(kind) .. parent
    end
    if not redis.call('ZSCORE', zset, name) then
      local base = redis.call('ZRANGE', zset, 0, 0, 'WITHSCORES')[2] or redis.call('HGET', Q .. 'v', left) or '0'
      if tonumber(step[2][i + 1]) <= tonumber(base) then n = n + redis.call('HDEL', Q .. 'v', step[2][i]) end
    end
  end
end
return {step[1], n}
