-- What a gateway's loop pass has for the cell, in one call: settlements, each as settle.lua does it, then admissions, each
-- as admit.lua does it, in the order given. A fault in one does not reach the others.
-- ARGV: 1 settlements, '' or a msgpack array: cell prefix, now_ms, retention_ms, then per request 5: request, prompt
--       tokens, output tokens, cost (nano), prompt tokens found cached. At most 64.
--       2 how long bodies live, ms, then per admission 2: all arguments of admit.lua as a msgpack array (what is written as it comes, 2, 6, 9, 16
--       and 38, as text), and the body, or '' where it was SET before. At most 32.
-- Returns {faults, roomy, answers...}. faults: of settlements, '' = none; roomy: a character per admission, '1' = no limit
-- and no replica is so full that its settlement could be missed for a moment; answers: as admit.lua's, {'error', text}
-- where that would have failed.
local function text_of(fault)
  return type(fault) == 'table' and fault.err or tostring(fault)
end

local answers, faults, rooms = {'', ''}, {}, {}
if ARGV[1] ~= '' then
  local given = cmsgpack.unpack(ARGV[1])
  for i = 4, #given, 5 do
    local ok, fault = pcall(settle, {given[1], given[2], given[i], given[i + 1], given[i + 2], given[i + 3], given[3],
                                     given[i + 4]})
    if not ok then faults[#faults + 1] = text_of(fault) end
  end
end
for i = 3, #ARGV, 2 do
  is_roomy = false
  local ok, answer = pcall(admit, cmsgpack.unpack(ARGV[i]), ARGV[i + 1], ARGV[2])
  answers[#answers + 1] = ok and answer or {'error', text_of(answer)}
  rooms[#rooms + 1] = ok and is_roomy and '1' or '0'
end
write_replicas()
write_scopes()
if faults[1] and not ARGV[3] then return redis.error_reply('ERR settle: ' .. faults[1]) end -- nobody reads the answer
answers[1], answers[2] = table.concat(faults, '; '), table.concat(rooms)
return answers
