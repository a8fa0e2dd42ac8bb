-- One engine step for one gateway: appends each entry to its journal only where epoch and offset match and the money
-- held (`upto`) allows, and publishes one frame that carries exactly what was accepted. A finished request leaves its
-- usage event in the same call. Only keys under the machine's prefix.
-- The most frequent script of all. Numbers stay the strings they came as wherever they can, since every one that Lua
-- hands to Redis is printed with 17 digits first. And of the lease three fields are read: `open` is the epoch whose
-- holder may append and has no news to be told; whoever changes that (lib_bind.lua says who) clears it.
--
-- ARGV: 1 machine prefix, 2 gateway, 3 journal life in ms after the end, 4 usage stream bound, then per entry 7:
--       request, epoch, offset, offset after it, frame entry (msgpack), journal entry (msgpack), usage event or ''.
-- Returns one character per entry: a accepted, c accepted but the client has gone, m accepted but the client reads
--         elsewhere now (read the lease), s stale, d duplicate (accepted before), g gap, b beyond the hold.
local ARGV, call, leases, journals = ARGV, redis.call, ARGV[1] .. 'req:', ARGV[1] .. 'jrn:'
local verdicts, frame, n_frame = {}, {}, 0
for i = 5, #ARGV, 7 do
  local id, offset, after, usage = ARGV[i], ARGV[i + 2], ARGV[i + 3], ARGV[i + 6]
  local k = leases .. id
  local r = call('HMGET', k, 'open', 'n', 'upto')
  local v = 'a'
  if r[1] ~= ARGV[i + 1] then
    local now = call('HMGET', k, 'epoch', 'state', 'cancel', 'moved')
    if now[1] ~= ARGV[i + 1] then
      v = 's'
    elseif now[2] ~= 'claimed' then
      v = now[2] == 'done' and 'd' or 's' -- done: sent again after a lost answer, its end was accepted
    else
      v = now[3] and 'c' or now[4] and 'm' or 'a'
    end
  end
  if v ~= 's' and v ~= 'd' then
    if r[2] ~= offset then
      v = tonumber(offset) < tonumber(r[2]) and 'd' or 'g'
    elseif after ~= offset and tonumber(after) > tonumber(r[3]) then
      v = 'b'
    end
  end
  if v == 'a' or v == 'c' or v == 'm' then
    local j = journals .. id
    if usage ~= '' then
      call('HSET', k, 'open', '', 'n', after, 'state', 'done')
      call('RPUSH', j, ARGV[i + 5])
      call('XADD', ARGV[1] .. 'usage', 'MAXLEN', '~', ARGV[4], '*', 'u', usage)
      call('DEL', ARGV[1] .. 'body:' .. id)
      call('PEXPIRE', j, ARGV[3])
      call('PEXPIRE', k, ARGV[3])
    else
      if after ~= offset then call('HSET', k, 'n', after) end
      call('RPUSH', j, ARGV[i + 5])
      if offset == '0' then call('PEXPIRE', j, '21600000') end -- the lease's (lib_bind.lua): it may be settled without an end
    end
    n_frame = n_frame + 1
    frame[n_frame] = ARGV[i + 4]
  end
  verdicts[#verdicts + 1] = v
end
if n_frame > 0 then
  local head
  if n_frame < 16 then
    head = string.char(0x90 + n_frame)
  else
    head = string.char(0xdc, math.floor(n_frame / 256), n_frame % 256)
  end
  call('PUBLISH', ARGV[1] .. 'g:' .. ARGV[2], head .. table.concat(frame))
end
return table.concat(verdicts)
