-- Admission in one atomic call: take the holds at key, project and organization, or say which limit refused and
-- when to retry; then bind to the first candidate with a free slot, else file in the fair queue (bounded).
-- The body was SET under body:<id> in the same pipeline; a refusal deletes it.
--
-- ARGV: 1 cell prefix, 2 now_ms, 3 request, 4 deployment, 5 gateway, 6 stream, 7 price version,
--       8 prompt tokens (estimate), 9 output tokens to hold, 10 money to hold (nano), 11 queue score, 12 queue bound,
--       13 retention_ms of the record, 14 rate of one output token (nano, >= 0),
--       15.. three scopes of 6: id, rpm, input_tpm, output_tpm, max_concurrency, budget_nano (-1 = no limit),
--       33.. ranked candidate replica ids.
-- Returns {'bound', epoch, rid, hold_out} | {'queued', depth, waiting_for_replica 0|1, hold_out}
--       | {'refused', scope, limit, retry_ms, limit_value, remaining} | {'seed', scope, id} | {'full', depth}.
local P, now = ARGV[1], tonumber(ARGV[2])
local id, did = ARGV[3], ARGV[4]
local n_in, n_out, money = tonumber(ARGV[8]), tonumber(ARGV[9]), tonumber(ARGV[10])
local out_rate = tonumber(ARGV[14])
local SCOPE = {'key', 'prj', 'org'}
local rec_key = P .. 'req:' .. id

local function refuse(scope, limit, retry_ms, cap, left)
  redis.call('DEL', P .. 'body:' .. id)
  return {'refused', scope, limit, math.ceil(retry_ms), math.floor(cap), math.floor(left)}
end

if redis.call('EXISTS', rec_key) == 1 then return {'exists'} end

-- First pass: would every scope allow it? Nothing is written before all of them do.
local money_left = nil
for s = 1, 3 do
  local a = 15 + (s - 1) * 6
  local h = P .. 'lim:' .. SCOPE[s] .. ':' .. ARGV[a]
  local rpm, itpm, otpm = tonumber(ARGV[a + 1]), tonumber(ARGV[a + 2]), tonumber(ARGV[a + 3])
  local conc, budget = tonumber(ARGV[a + 4]), tonumber(ARGV[a + 5])
  if rpm >= 0 then
    local l = level(h, 'rq', rpm, now)
    if l < 1 then return refuse(SCOPE[s], 'requests_per_minute', (1 - l) * 60000 / math.max(rpm, 1), rpm, 0) end
  end
  if itpm >= 0 then
    local l = level(h, 'in', itpm, now)
    -- A prompt larger than the whole minute is let through when the bucket is full, and the level goes negative.
    if l < math.min(n_in, itpm) or itpm == 0 then
      return refuse(SCOPE[s], 'input_tokens_per_minute', (math.min(n_in, itpm) - l) * 60000 / math.max(itpm, 1), itpm, l)
    end
  end
  if otpm >= 0 then
    local l = level(h, 'out', otpm, now)
    if l < math.min(n_out, otpm) or otpm == 0 then
      return refuse(SCOPE[s], 'output_tokens_per_minute', (math.min(n_out, otpm) - l) * 60000 / math.max(otpm, 1), otpm, l)
    end
  end
  if conc >= 0 then
    local c = tonumber(redis.call('HGET', h, 'conc') or '0')
    if c >= conc then return refuse(SCOPE[s], 'concurrency', 1000, conc, conc - c) end
  end
  if budget >= 0 then
    local m = redis.call('HMGET', h, 'spent', 'held')
    if not m[1] then
      redis.call('DEL', P .. 'body:' .. id)
      return {'seed', SCOPE[s], ARGV[a]}
    end
    local left = budget - tonumber(m[1]) - tonumber(m[2] or '0')
    if not money_left or left < money_left then money_left = left end
    -- hold = min(worst case, what is left): the prompt and one token must fit.
    if left < money - out_rate * math.max(n_out - 1, 0) then
      return refuse(SCOPE[s], 'budget', -1, budget, math.max(left, 0))
    end
  end
end
if money_left and money_left < money and out_rate > 0 then
  local cut = math.ceil((money - money_left) / out_rate)
  n_out = math.max(n_out - cut, 1)
  money = money - cut * out_rate
end

-- Room: a candidate with a slot, else a place in the queue.
local q = P .. 'dep:' .. did .. ':q'
local rid = nil
if redis.call('ZCARD', q) == 0 then
  for i = 33, #ARGV do
    if has_slot(P, ARGV[i]) then rid = ARGV[i]; break end
  end
end
local depth = redis.call('ZCARD', q)
if not rid and depth >= tonumber(ARGV[12]) then
  redis.call('DEL', P .. 'body:' .. id)
  return {'full', depth}
end

-- Second pass: take the holds.
for s = 1, 3 do
  local a = 15 + (s - 1) * 6
  local h = P .. 'lim:' .. SCOPE[s] .. ':' .. ARGV[a]
  local rpm, itpm, otpm = tonumber(ARGV[a + 1]), tonumber(ARGV[a + 2]), tonumber(ARGV[a + 3])
  if rpm >= 0 then put_level(h, 'rq', level(h, 'rq', rpm, now) - 1, now) end
  if itpm >= 0 then put_level(h, 'in', level(h, 'in', itpm, now) - n_in, now) end
  if otpm >= 0 then put_level(h, 'out', level(h, 'out', otpm, now) - n_out, now) end
  redis.call('HINCRBY', h, 'conc', 1)
  if tonumber(ARGV[a + 5]) >= 0 then redis.call('HINCRBY', h, 'held', string.format('%.0f', money)) end
end

redis.call('HSET', rec_key, 'state', 'queued', 'dep', did, 'gw', ARGV[5], 'stream', ARGV[6], 'pv', ARGV[7],
  'in_est', n_in, 'out_est', n_out, 'hold_out', n_out, 'money', string.format('%.0f', money), 'adm_ms', ARGV[2],
  'key', ARGV[15], 'prj', ARGV[21], 'org', ARGV[27],
  -- which scopes hold what, so that a settle undoes exactly this, whatever the limits are by then
  'caps', table.concat({ARGV[17], ARGV[18], ARGV[20], ARGV[23], ARGV[24], ARGV[26], ARGV[29], ARGV[30], ARGV[32]}, ','),
  'n', 0, 'epoch', 0, 'attempt', 0, 'crashes', 0)
redis.call('PEXPIRE', rec_key, 21600000)
if rid then
  local epoch = bind(P, id, rid, now)
  if epoch then return {'bound', epoch, rid, n_out} end
end
redis.call('ZADD', q, ARGV[11], id)
redis.call('PEXPIRE', P .. 'body:' .. id, 21600000)
pump(P, did, now)
if redis.call('HGET', rec_key, 'state') == 'bound' then
  local r = redis.call('HMGET', rec_key, 'epoch', 'rid')
  return {'bound', tonumber(r[1]), r[2], n_out}
end
local n_reps = redis.call('SCARD', P .. 'dep:' .. did .. ':reps')
if n_reps == 0 then redis.call('PUBLISH', P .. 'wake', did) end
return {'queued', redis.call('ZCARD', q), n_reps == 0 and 1 or 0, n_out}
