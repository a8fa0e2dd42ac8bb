-- Several settlements in one call, each as settle.lua does it (`one` is that script), in the order given. A fault in one
-- does not reach the others; the first is the call's answer.
-- ARGV: 1 cell prefix, 2 now_ms, 3 retention_ms, then per request 5: request, prompt tokens, output tokens, cost (nano),
--       prompt tokens found cached. At most 64. Returns how many this call settled.
local n, fault = 0, nil
for i = 4, #ARGV, 5 do
  local ok, answer = pcall(one, {ARGV[1], ARGV[2], ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3], ARGV[3], ARGV[i + 4]})
  if ok then
    n = n + answer[1]
  else
    fault = fault or (type(answer) == 'table' and answer.err or tostring(answer))
  end
end
write_scopes()
if fault then return redis.error_reply('ERR settle: ' .. fault) end
return n
