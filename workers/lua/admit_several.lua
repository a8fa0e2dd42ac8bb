-- Several admissions in one call, each as admit.lua does it (`one` is that script), in the order given. A fault in one
-- does not reach the others.
-- ARGV: 1.. per request all arguments of admit.lua, as one msgpack array; what is written as it comes
--       (2, 6, 9, 16, 38) comes as text. At most 32.
-- Returns an answer each; {'error', text} where admit.lua would have failed.
local answers = {}
for i = 1, #ARGV do
  local ok, answer = pcall(one, cmsgpack.unpack(ARGV[i]))
  if not ok then answer = {'error', type(answer) == 'table' and answer.err or tostring(answer)} end
  answers[i] = answer
end
write_scopes()
return answers
