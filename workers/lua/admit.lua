-- Admission in one atomic call: take the holds at key, project and organization, or say which limit refused and
-- when to retry; then bind to the first candidate with a free slot, else file in the fair queue (bounded).
-- A long body was SET under body:<id> in the same pipeline, and a refusal deletes it; a short one comes as `body`, to live
-- for `body_ms`. Whoever calls this writes replicas and scopes at its end, and may read `is_roomy` then.
--
-- ARGV: 1 cell prefix, 2 now_ms, 3 request, 4 deployment, 5 gateway, 6 stream, 7 price version,
--       8 prompt tokens (estimate), 9 output tokens to hold, 10 money to hold (nano),
--       11 order key inside the flow (lowest first), 12 queue bound,
--       13 money of the prompt alone (nano, a fraction), 14 rate of one output token (nano, a fraction),
--       15 note of what a reconnect must know (kept as it is), 16 tokens carried over from the request that this one
--       continues, whose journal lies under jrn:<id> (0 = a request of its own),
--       17.. three scopes of 7: id, rpm, input_tpm, output_tpm, max_concurrency, budget_nano (-1 = no limit), weight,
--       38 band, 39 output tokens expected, 40 prefix hashes, 41 fairness window (counter units), 42 age_ms,
--       43 share: with money for fewer than so many worst cases left, hold only 1/share of it (0: all of it),
--       44 predicted ms that it keeps a slot busy, 45 most such ms that may wait before it (refused beyond, where there
--       are replicas and none has a free slot; -2: only an overflow may have it, free slot or not), 46 most such ms
--       that its organization may have waiting, if the slots were its own, to be let in all the same where others wait,
--       too (its share by weight),
--       47.. ranked candidate replica ids; and last, where there are any, the window budgets (msgpack, lib_windows.lua), or,
--       where the end customer is limited, {e: its scope of 7 as above, and 1 where its money is leased (seed.lua),
--       w: the window budgets, if any}.
-- Returns {'bound', epoch, rid, hold_out, heads...}
--       | {'queued', depth, waiting_for_replica 0|1, hold_out, ms before it, heads...}
--       | {'late', depth, ms before it, heads...} | {'refused', scope, limit, retry_ms, limit_value, remaining, heads...}
--       | {'full', depth, whose 'deployment'|'organization', heads...} | {'seed', scope, id}
--       | {'seed', 'bud', id, start, end of the window}
--       | {'exists'} (the id was used before) | {'gone'} (no body, or no journal to continue: nothing was taken);
--         heads: what the limits stand at (lib_limits.lua), none where nothing is limited.
local P, now = ARGV[1], tonumber(ARGV[2])
local id, did = ARGV[3], ARGV[4]
local n_in, n_out, money = tonumber(ARGV[8]), tonumber(ARGV[9]), tonumber(ARGV[10])
local prompt_money, out_rate, share = tonumber(ARGV[13]), tonumber(ARGV[14]), tonumber(ARGV[43])
local n_carried = tonumber(ARGV[16])
local rec_key = P .. 'req:' .. id
local OVERFLOW_ONLY = -2
local n_args, budgets, ends = #ARGV, nil, nil
-- Unpacked already where several admissions came together; ids and numbers are printable, a msgpack array or map never
-- is.
if type(ARGV[n_args]) == 'table' then
  n_args, budgets = n_args - 1, ARGV[n_args]
elseif (string.byte(ARGV[n_args]) or 0) >= 0x80 then
  n_args, budgets = n_args - 1, cmsgpack.unpack(ARGV[n_args])
end
if budgets and budgets.e then ends, budgets = budgets.e, budgets.w end

if redis.call('EXISTS', rec_key) == 1 then return {'exists'} end

local has_body = body and body ~= '' -- else it was SET

local function drop_body()
  if not has_body then redis.call('DEL', P .. 'body:' .. id) end
end

-- First pass: would every scope allow it? Nothing is written before all of them do.
local look = examine(P, now, ARGV, 17, n_in, n_out)
-- A leased budget: `ends[6]` becomes this cell's part of it; without one that counts it is asked for first.
local lease, is_lapsed, is_dry = nil, false, true
if ends and ends[8] then
  lease = redis.call('HMGET', scope_key(P, 0, ends[1]), 'lease', 'until', 'dry', 'rest')
  is_lapsed, is_dry = tonumber(lease[2] or '0') <= now, tonumber(lease[3] or '0') > now
  ends[9] = ends[6]
  if not is_lapsed then ends[6] = math.min(ends[6], tonumber(lease[1])) end
end
if ends then examine(P, now, ends, 1, n_in, n_out, look) end
if is_lapsed and not look.refusal then
  drop_body()
  return {'seed', SCOPE[0], ends[1]}
end
if look.seed and not look.refusal then
  drop_body()
  return {'seed', SCOPE[look.seed], look.seed == 0 and ends[1] or ARGV[17 + (look.seed - 1) * 7]}
end
if budgets then
  local unseeded = seldom().examine_windows(P, budgets, look)
  if unseeded and not look.refusal then
    drop_body()
    return unseeded
  end
end
-- The money held: the worst case where much is left; else a share of what is left, topped up as it is used
-- (topup.lua), or, without sharing, what is left of the worst case. The prompt and one token must fit.
local granted, left = n_out, look.left
if lease and look.tight == 0 and left < money and ends[6] < ends[9] and not is_dry and not look.refusal then
  drop_body()
  return {'seed', SCOPE[0], ends[1]} -- perhaps there is more to be had
end
if left and not look.seed and left < money * math.max(share, 1) then
  local least = math.ceil(prompt_money + math.min(n_out, 1) * out_rate)
  if left < least then
    if look.tight > 3 then
      look.refusal = seldom().refused_by(look.windows[look.tight - 3], least, left)
    else
      local budget = tonumber(look.tight == 0 and (ends[9] or ends[6]) or ARGV[17 + (look.tight - 1) * 7 + 5])
      local is_elsewhere = look.tight == 0 and lease and tonumber(lease[4] or '0') > 0
      local retry_ms = is_elsewhere and math.max(tonumber(lease[3] or '0') - now, 1000) or -1
      look.refusal = {SCOPE[look.tight], 'budget', retry_ms, budget, math.max(left, 0)}
    end
  elseif out_rate > 0 then
    local rest = (left - prompt_money) / math.max(share, 1)
    granted = math.min(math.max(math.floor(rest / out_rate), math.min(n_out, 1)), n_out)
    if granted < n_out then money = math.min(math.ceil(prompt_money + granted * out_rate), left) end
  end
end
if look.refusal then
  local scope, limit, retry_ms, cap, remaining = unpack(look.refusal)
  drop_body()
  local org = scope_of(P, 3, ARGV[31])
  if org.ms then put(org, 'n', org.n + 1) end
  return {'refused', scope, limit, math.ceil(retry_ms), math.floor(cap), math.floor(remaining),
    unpack(heads(look, 0, 0, 0))}
end

-- Room: a candidate with a slot, else a place in the queue.
local q = P .. 'dep:' .. did .. ':q'
local depth = n_waiting(P, did)
local rid, mid, n_free = nil, nil, 0
local is_hopeless = tonumber(ARGV[45]) == OVERFLOW_ONLY
if depth == 0 and not is_hopeless then
  for i = 47, n_args do
    mid, n_free = with_slot(P, ARGV[i], id)
    if mid and not (n_carried > 0 and replica_of(P, ARGV[i]).ext) then rid = ARGV[i]; break end
  end
end
if n_carried > 0 and redis.call('EXISTS', P .. 'jrn:' .. id) == 0 then
  drop_body()
  return {'gone'}
end
local before, is_alone = 0, false
if not rid then
  local whose = seldom().full(P, did, ARGV[31], depth, tonumber(ARGV[12]))
  local flow
  if depth > 0 and not whose then
    flow = {ARGV[38], tonumber(ARGV[23]), tonumber(ARGV[30]), tonumber(ARGV[37]), ARGV[17], ARGV[24], ARGV[31]}
    before = seldom().ahead_of(P, did, flow, tonumber(ARGV[41]))
  end
  write_replicas()
  local is_late = is_hopeless or (not whose and before > tonumber(ARGV[45]) and seldom().is_taken(P, did)
    and not (flow and seldom().within_share(P, did, flow, tonumber(ARGV[46]))))
  is_alone = redis.call('SCARD', P .. 'dep:' .. did .. ':reps') == 0
  if (whose or is_late or is_alone) and n_carried == 0 then rid, mid, n_free = seldom().overflow_slot(P, did) end
  if not rid and whose and not is_hopeless then
    drop_body()
    return {'full', depth, whose, unpack(heads(look, 0, 0, 0))}
  elseif not rid and is_late then
    drop_body()
    return {'late', depth, before, unpack(heads(look, 0, 0, 0))}
  end
end
if rid and has_body then
  redis.call('SET', P .. 'm:' .. mid .. ':body:' .. id, body, 'PX', body_ms)
elseif rid and not move_body(P, P .. 'm:' .. mid .. ':', id) then
  return {'gone'}
end
if rid and n_carried > 0 then
  local journal = P .. 'm:' .. mid .. ':jrn:' .. id
  redis.call('RENAME', P .. 'jrn:' .. id, journal)
  redis.call('PERSIST', journal)
end

-- Second pass: take the holds.
local adm = {did, ARGV[7], n_in, n_out, math.floor(money), now, ARGV[38], math.min(tonumber(ARGV[39]), n_out), ARGV[40],
  ARGV[15], ARGV[17], ARGV[24], ARGV[31], tonumber(ARGV[23]), tonumber(ARGV[30]), tonumber(ARGV[37]),
  -- which scopes hold what, so that a settle undoes exactly this, whatever the limits are by then
  tonumber(ARGV[19]), tonumber(ARGV[20]), tonumber(ARGV[22]), tonumber(ARGV[26]), tonumber(ARGV[27]),
  tonumber(ARGV[29]), tonumber(ARGV[33]), tonumber(ARGV[34]), tonumber(ARGV[36]), tonumber(ARGV[44])}
take(look, now, money)
if budgets then adm[WINDOWS] = seldom().take_windows(look, math.floor(money)) end
if ends then
  adm[WINDOWS] = adm[WINDOWS] or {} -- no gaps: what is packed stays an array
  adm[ENDS] = {ends[1], tonumber(ends[3]), tonumber(ends[4]), tonumber(ends[6]), ends[9]}
end
local packed = cmsgpack.pack(adm)
if rid then
  redis.call('HSET', rec_key, 'state', 'bound', 'adm', packed, 'gw', ARGV[5], 'stream', ARGV[6],
    'epoch', '1', 'attempt', '1', 'rid', rid, 'mid', mid)
else
  redis.call('HSET', rec_key, 'state', 'queued', 'adm', packed, 'gw', ARGV[5], 'stream', ARGV[6])
end
if n_carried > 0 then redis.call('HSET', rec_key, 'n', n_carried) end
-- How many output tokens the money held pays for, where it is less than was asked.
if granted < n_out then redis.call('HSET', rec_key, 'granted', granted, 'hold_out', granted) end
redis.call('PEXPIRE', rec_key, LEASE_GC_MS)
if rid then
  hand_over(P, P .. 'm:' .. mid .. ':', id, rid, '1', '1', ARGV[5], ARGV[6], ARGV[16],
    granted == n_out and ARGV[9] or granted)
  note_prefixes(P, rid, ARGV[40], ARGV[2])
  if is_alone then redis.call('PUBLISH', P .. 'wake', did) end -- the overflow has it, and somebody should come
  is_roomy = n_free >= ROOMY_SLOTS and look.is_roomy and (not left or left > ROOMY * money)
  return {'bound', 1, rid, granted, unpack(heads(look, 1, n_in, n_out))}
end
redis.call('HSET', P .. 'dep:' .. did .. ':v', 'w', ARGV[41], 'a', ARGV[42])
seldom().join(P, did, id, flow_of(adm), ARGV[11], now)
if has_body then
  redis.call('SET', P .. 'body:' .. id, body, 'PX', LEASE_GC_MS)
else
  redis.call('PEXPIRE', P .. 'body:' .. id, LEASE_GC_MS)
end
if n_carried > 0 then redis.call('PEXPIRE', P .. 'jrn:' .. id, LEASE_GC_MS) end
seldom().pump(P, did, now)
if redis.call('HGET', rec_key, 'state') == 'bound' then
  local r = redis.call('HMGET', rec_key, 'epoch', 'rid')
  return {'bound', tonumber(r[1]), r[2], granted, unpack(heads(look, 1, n_in, n_out))}
end
if is_alone then redis.call('PUBLISH', P .. 'wake', did) end
return {'queued', redis.call('ZCARD', q), is_alone and 1 or 0, granted, before, unpack(heads(look, 1, n_in, n_out))}
