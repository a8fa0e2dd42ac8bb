-- Memory is short: journals of requests that have ended are kept for less long. Those that run keep theirs (their life
-- is longer than any retention).
-- ARGV: 1 life_ms from now on, 2 retention_ms, 3.. journals. Returns how many were shortened.
local life, n = tonumber(ARGV[1]), 0
for i = 3, #ARGV do
  local left = redis.call('PTTL', ARGV[i])
  if left > life and left <= tonumber(ARGV[2]) then n = n + redis.call('PEXPIRE', ARGV[i], life) end
end
return n
