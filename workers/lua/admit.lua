-- Admission in one atomic call: take the holds at key, project and organization, or say which limit refused and
-- when to retry; then bind to the first candidate with a free slot, else file in the fair queue (bounded).
-- The body was SET under body:<id> in the same pipeline; a refusal deletes it.
--
-- ARGV: 1 cell prefix, 2 now_ms, 3 request, 4 deployment, 5 gateway, 6 stream, 7 price version,
--       8 prompt tokens (estimate), 9 output tokens to hold, 10 money to hold (nano),
--       11 order key inside the flow (lowest first), 12 queue bound,
--       13 retention_ms of the record, 14 rate of one output token (nano, >= 0),
--       15 note of what a reconnect must know (kept as it is), 16 tokens carried over from the request that this one
--       continues, whose journal lies under jrn:<id> (0 = a request of its own),
--       17.. three scopes of 7: id, rpm, input_tpm, output_tpm, max_concurrency, budget_nano (-1 = no limit), weight,
--       38 band, 39 output tokens expected, 40 prefix hashes, 41 fairness window (counter units), 42 age_ms,
--       43.. ranked candidate replica ids.
-- Returns {'bound', epoch, rid, hold_out} | {'queued', depth, waiting_for_replica 0|1, hold_out}
--       | {'refused', scope, limit, retry_ms, limit_value, remaining} | {'seed', scope, id}
--       | {'full', depth, whose 'deployment'|'organization'}
--       | {'exists'} (the id was used before) | {'gone'} (no body: nothing was taken).
local P, now = ARGV[1], tonumber(ARGV[2])
local id, did = ARGV[3], ARGV[4]
local n_in, n_out, money = tonumber(ARGV[8]), tonumber(ARGV[9]), tonumber(ARGV[10])
local out_rate, n_carried = tonumber(ARGV[14]), tonumber(ARGV[16])
local rec_key = P .. 'req:' .. id

local function refuse(scope, limit, retry_ms, cap, left)
  redis.call('DEL', P .. 'body:' .. id)
  return {'refused', scope, limit, math.ceil(retry_ms), math.floor(cap), math.floor(left)}
end

-- Milliseconds until a bucket at `level` holds `need`.
local function wait_ms(need, level, cap)
  return (need - level) * 60000 / math.max(cap, 1)
end

if redis.call('EXISTS', rec_key) == 1 then return {'exists'} end

-- First pass: would every scope allow it? Nothing is written before all of them do.
local money_left = nil
local taken = {} -- per scope: the fields to write once admitted
for s = 1, 3 do
  local a = 17 + (s - 1) * 7
  local h = scope_key(P, s, ARGV[a])
  local rpm, itpm, otpm = tonumber(ARGV[a + 1]), tonumber(ARGV[a + 2]), tonumber(ARGV[a + 3])
  local cap_conc, budget = tonumber(ARGV[a + 4]), tonumber(ARGV[a + 5])
  local v = redis.call('HMGET', h, 'rq', 'in', 'out', 'ms', 'conc', 'spent', 'held')
  local elapsed_ms = math.max(now - tonumber(v[4] or now), 0)
  local set = {'ms', math.max(now, tonumber(v[4] or now))}
  if rpm >= 0 then
    local l = refilled(v[1], rpm, elapsed_ms)
    if l < 1 then return refuse(SCOPE[s], 'requests_per_minute', wait_ms(1, l, rpm), rpm, 0) end
    set[#set + 1] = 'rq'
    set[#set + 1] = l - 1
  end
  if itpm >= 0 then
    local l = refilled(v[2], itpm, elapsed_ms)
    -- A prompt larger than the whole minute is let through when the bucket is full, and the level goes negative.
    local need = math.min(n_in, itpm)
    if l < need or itpm == 0 then
      return refuse(SCOPE[s], 'input_tokens_per_minute', wait_ms(need, l, itpm), itpm, l)
    end
    set[#set + 1] = 'in'
    set[#set + 1] = l - n_in
  end
  if otpm >= 0 then
    local l = refilled(v[3], otpm, elapsed_ms)
    local need = math.min(n_out, otpm)
    if l < need or otpm == 0 then
      return refuse(SCOPE[s], 'output_tokens_per_minute', wait_ms(need, l, otpm), otpm, l)
    end
    -- The number taken may still shrink with the money; written below.
    set[#set + 1] = 'out'
    set[#set + 1] = l
    set.out_at = #set
  end
  local conc = tonumber(v[5] or '0')
  if cap_conc >= 0 and conc >= cap_conc then
    return refuse(SCOPE[s], 'concurrency', 1000, cap_conc, cap_conc - conc)
  end
  set[#set + 1] = 'conc'
  set[#set + 1] = conc + 1
  if budget >= 0 then
    if not v[6] then
      redis.call('DEL', P .. 'body:' .. id)
      return {'seed', SCOPE[s], ARGV[a]}
    end
    set.held = v[7] or '0'
    local left = budget - tonumber(v[6]) - tonumber(set.held)
    if not money_left or left < money_left then money_left = left end
    -- hold = min(worst case, what is left): the prompt and one token must fit.
    if left < money - out_rate * math.max(n_out - 1, 0) then
      return refuse(SCOPE[s], 'budget', -1, budget, math.max(left, 0))
    end
  end
  taken[s] = set
end
if money_left and money_left < money and out_rate > 0 then
  local cut = math.ceil((money - money_left) / out_rate)
  n_out = math.max(n_out - cut, 1)
  money = money - cut * out_rate
end

-- Room: a candidate with a slot, else a place in the queue.
local q = P .. 'dep:' .. did .. ':q'
local depth = redis.call('ZCARD', q)
local rid, mid = nil, nil
if depth == 0 then
  for i = 43, #ARGV do
    mid = with_slot(P, ARGV[i])
    if mid then rid = ARGV[i]; break end
  end
end
if rid and not move_body(P, P .. 'm:' .. mid .. ':', id) then return {'gone'} end
if rid and n_carried > 0 then redis.call('RENAME', P .. 'jrn:' .. id, P .. 'm:' .. mid .. ':jrn:' .. id) end
if not rid then
  local whose = full(P, did, ARGV[31], depth, tonumber(ARGV[12]))
  if whose then
    redis.call('DEL', P .. 'body:' .. id)
    return {'full', depth, whose}
  end
end

-- Second pass: take the holds.
local held = string.format('%.0f', money)
for s = 1, 3 do
  local a = 17 + (s - 1) * 7
  local h, set = scope_key(P, s, ARGV[a]), taken[s]
  if set.out_at then set[set.out_at] = set[set.out_at] - n_out end
  if set.held then put_money(h, set, 'held', set.held, money) end
  redis.call('HSET', h, unpack(set))
end

redis.call('HSET', rec_key, 'state', rid and 'bound' or 'queued', 'dep', did, 'gw', ARGV[5], 'stream', ARGV[6],
  'pv', ARGV[7], 'in_est', n_in, 'out_est', n_out, 'hold_out', n_out, 'money', held, 'adm_ms', ARGV[2],
  'key', ARGV[17], 'prj', ARGV[24], 'org', ARGV[31], 'note', ARGV[15],
  'fq', table.concat({ARGV[38], ARGV[23], ARGV[30], ARGV[37]}, ','), 'pred', math.min(tonumber(ARGV[39]), n_out), 'pfx', ARGV[40],
  -- which scopes hold what, so that a settle undoes exactly this, whatever the limits are by then
  'caps', table.concat({ARGV[19], ARGV[20], ARGV[22], ARGV[26], ARGV[27], ARGV[29], ARGV[33], ARGV[34], ARGV[36]}, ','),
  'n', n_carried, 'crashes', 0, 'epoch', rid and 1 or 0, 'attempt', rid and 1 or 0, 'rid', rid or '', 'mid', mid or '',
  'bound_ms', rid and now or 0)
redis.call('PEXPIRE', rec_key, LEASE_GC_MS)
if rid then
  hand_over(P, P .. 'm:' .. mid .. ':', id, rid, 1, 1, ARGV[5], ARGV[6], n_carried, n_out)
  note_prefixes(P, rid, ARGV[40], now)
  return {'bound', 1, rid, n_out}
end
redis.call('HSET', P .. 'dep:' .. did .. ':v', 'w', ARGV[41], 'a', ARGV[42])
local f = {ARGV[38], tonumber(ARGV[23]), tonumber(ARGV[30]), tonumber(ARGV[37]), ARGV[17], ARGV[24], ARGV[31]}
join(P, did, id, f, ARGV[11], now)
redis.call('PEXPIRE', P .. 'body:' .. id, LEASE_GC_MS)
pump(P, did, now)
if redis.call('HGET', rec_key, 'state') == 'bound' then
  local r = redis.call('HMGET', rec_key, 'epoch', 'rid')
  return {'bound', tonumber(r[1]), r[2], n_out}
end
local n_reps = redis.call('SCARD', P .. 'dep:' .. did .. ':reps')
if n_reps == 0 then redis.call('PUBLISH', P .. 'wake', did) end
return {'queued', redis.call('ZCARD', q), n_reps == 0 and 1 or 0, n_out}
