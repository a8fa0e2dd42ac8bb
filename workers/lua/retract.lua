-- An admission was refused: what was taken in the request's name before it (idem.lua, continue.lua) is given back, where
-- it is still its own.
-- ARGV: 1 cell prefix, 2 request, 3 project, 4 digest of its idempotency key ('' = none), 5 the request it was to
--       continue, as the client knows it ('' = none).
local P, id = ARGV[1], ARGV[2]
if ARGV[4] ~= '' then
  local k = P .. 'idem:' .. ARGV[3] .. ':' .. ARGV[4]
  local held = redis.call('GET', k)
  if held and string.match(held, '^%S+') == id then redis.call('DEL', k) end
end
if ARGV[5] ~= '' then
  local rec_key = P .. 'req:' .. ARGV[5]
  local r = redis.call('HMGET', rec_key, 'next', 'prev')
  if r[1] == id then
    redis.call('HDEL', rec_key, 'next', 'prev', 'next_ms')
    if r[2] ~= ARGV[5] then redis.call('HSET', rec_key, 'next', r[2], 'prev', r[2], 'next_ms', 0) end
  end
  redis.call('DEL', P .. 'jrn:' .. id)
end
return 1
