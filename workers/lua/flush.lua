-- One engine step for one gateway: appends each entry to its journal only where epoch and offset match, draws its
-- hold down, and publishes one frame that carries exactly what was accepted. A finished request leaves its usage
-- event in the same call. Only keys under the machine's prefix.
--
-- ARGV: 1 machine prefix, 2 gateway, 3 journal life in ms after the end, 4 usage stream bound, then per entry 7:
--       request, epoch, offset, n tokens, frame entry (msgpack), journal entry (msgpack), usage event or ''.
-- Returns one character per entry: a accepted, c accepted but the client has gone, m accepted but the client reads
--         elsewhere now (read the lease), s stale, d duplicate (accepted before), g gap, b beyond the hold.
local M = ARGV[1]
local verdicts, frame, n_frame = {}, {}, 0
for i = 5, #ARGV, 7 do
  local id = ARGV[i]
  local k = M .. 'req:' .. id
  local r = redis.call('HMGET', k, 'epoch', 'n', 'hold', 'state', 'cancel', 'moved')
  local offset, n = tonumber(ARGV[i + 2]), tonumber(ARGV[i + 3])
  local v
  if r[1] == ARGV[i + 1] and r[4] == 'done' then
    v = 'd' -- sent again after a lost answer: its end was accepted
  elseif r[1] ~= ARGV[i + 1] or r[4] ~= 'claimed' then
    v = 's'
  else
    local have = tonumber(r[2])
    if offset < have then
      v = 'd'
    elseif offset > have then
      v = 'g'
    elseif n > tonumber(r[3]) then
      v = 'b'
    else
      v = r[5] and 'c' or r[6] and 'm' or 'a'
      local ends = ARGV[i + 6] ~= ''
      if ends then
        redis.call('HSET', k, 'n', have + n, 'hold', tonumber(r[3]) - n, 'state', 'done')
      elseif n > 0 then
        redis.call('HSET', k, 'n', have + n, 'hold', tonumber(r[3]) - n)
      end
      local j = M .. 'jrn:' .. id
      redis.call('RPUSH', j, ARGV[i + 5])
      if ends then
        redis.call('XADD', M .. 'usage', 'MAXLEN', '~', ARGV[4], '*', 'u', ARGV[i + 6])
        redis.call('DEL', M .. 'body:' .. id)
        redis.call('PEXPIRE', j, ARGV[3])
        redis.call('PEXPIRE', k, ARGV[3])
      elseif have == 0 then
        redis.call('PEXPIRE', j, 21600000) -- the lease's (lib_bind.lua): it may be settled without an end
      end
      n_frame = n_frame + 1
      frame[n_frame] = ARGV[i + 4]
    end
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
  redis.call('PUBLISH', M .. 'g:' .. ARGV[2], head .. table.concat(frame))
end
return table.concat(verdicts)
