-- Included by admission, top-up and settlement: token buckets, concurrency and money holds of key, project and
-- organization. A scope's hash holds: rq, in, out (levels of the buckets at instant ms), conc (requests in flight),
-- dur (their usual duration, ms), n (requests of an organization, admitted or refused: its demand here), held
-- (nano-dollars held), spent (nano-dollars booked since the budget began; absent until seeded from the ledger), ask
-- (requests in flight that have used up their hold and found nothing left).

local SCOPE = {'key', 'prj', 'org'}
local BUCKET = {'requests_per_minute', 'input_tokens_per_minute', 'output_tokens_per_minute'}
local FIELD = {'rq', 'in', 'out'}

local function scope_key(P, s, scope_id)
  return P .. 'lim:' .. SCOPE[s] .. ':' .. scope_id
end

-- Level of a bucket of `cap` units a minute, `elapsed_ms` after it stood at `stored`. A refund may have lifted `stored`
-- above the cap: clamped here, where it is read.
local function refilled(stored, cap, elapsed_ms)
  return math.min(tonumber(stored) + elapsed_ms * cap / 60000, cap)
end

-- Level of a bucket never seen: full, unless this Redis lost what it knew less than a minute ago (`born`): then nobody
-- can say what was used, and it fills from empty.
local function unseen(P, cap, now)
  local born_ms = tonumber(redis.call('GET', P .. 'born') or '0')
  return refilled(0, cap, math.max(now - born_ms, 0))
end

-- What a call has read of scopes: the values of READ, by the scope's key. A script that serves several requests at once
-- keeps what they change and writes it back at its end (`several`, write_scopes), so that requests of one tenant share
-- the reading and the writing.
local several = false
local PLACE = {rq = 1, ['in'] = 2, out = 3, ms = 4, conc = 5, spent = 6, held = 7, dur = 8, n = 9}
local read, unwritten = {}, {}

local function read_scope(h)
  local v = read[h]
  if not v then
    v = redis.call('HMGET', h, 'rq', 'in', 'out', 'ms', 'conc', 'spent', 'held', 'dur', 'n')
    read[h] = v
  end
  return v
end

local function write_scopes()
  for h, fields in pairs(unwritten) do
    local set = {}
    for field, value in pairs(fields) do
      set[#set + 1] = field
      set[#set + 1] = value
    end
    redis.call('HSET', h, unpack(set))
  end
  unwritten = {}
end

-- `set`: fields and values in turn.
local function put_scope(h, set)
  if not several then
    redis.call('HSET', h, unpack(set))
    return
  end
  local v, fields = read[h], unwritten[h] or {}
  for i = 1, #set, 2 do
    v[PLACE[set[i]]] = set[i + 1]
    fields[set[i]] = set[i + 1]
  end
  unwritten[h] = fields
end

-- Adds to an integer amount of money: with the other fields of the hash (`set`, an argument list for HSET) where a
-- double holds the sum exactly, by Redis' own 64-bit integers beyond that.
local EXACT = 2 ^ 52

local function put_money(h, set, field, before, added)
  local sum = tonumber(before) + added
  if math.abs(sum) < EXACT and math.abs(tonumber(before)) < EXACT then
    set[#set + 1] = field
    set[#set + 1] = string.format('%.0f', sum)
  else
    write_scopes()
    local now = redis.call('HINCRBY', h, field, string.format('%.0f', added))
    if read[h] then read[h][PLACE[field]] = now end
  end
end

local function refuse_longest(look, retry_ms, scope, limit, cap, left)
  if look.refusal and retry_ms <= look.refusal[3] then return end
  look.refusal = {scope, limit, retry_ms, cap, left}
end

-- What a request of n_in and n_out tokens finds at its scopes, seven arguments each from args[at]: id, rpm, input_tpm,
-- output_tpm, max_concurrency, budget_nano (-1 = no limit), weight (not for here). Reads only. Answers a table:
--   1, 2, 3: per scope the fields to write once admitted
--   refusal: {scope, limit, retry_ms, cap, left} of the limit that refuses longest, or nil
--   seed: number of a scope whose booked money is not known here, or nil
--   left: the least money left at a scope with a budget, or nil; tight: that scope's number
--   caps, levels: of requests, input and output tokens, each of the scope that has the fewest left
local function examine(P, now, args, at, n_in, n_out)
  local look = {caps = {}, levels = {}}
  local need = {1, n_in, n_out}
  for s = 1, 3 do
    local a = at + (s - 1) * 7
    local cap_conc, budget = tonumber(args[a + 4]), tonumber(args[a + 5])
    local v = read_scope(scope_key(P, s, args[a]))
    local stood_ms = tonumber(v[4] or now)
    local elapsed_ms = math.max(now - stood_ms, 0)
    local conc = tonumber(v[5] or '0')
    local set = {'ms', math.max(now, stood_ms), 'conc', conc + 1}
    for i = 1, 3 do
      local cap = tonumber(args[a + i])
      if cap >= 0 then
        local level = v[i] and refilled(v[i], cap, elapsed_ms) or unseen(P, cap, now)
        -- What is larger than the whole minute is let through when the bucket is full, and the level goes negative.
        local enough = math.min(need[i], cap)
        if level < enough or cap == 0 then
          local wait_ms = (cap == 0 and 1 or enough - level) * 60000 / math.max(cap, 1)
          refuse_longest(look, wait_ms, SCOPE[s], BUCKET[i], cap, level)
        end
        set[#set + 1] = FIELD[i]
        set[#set + 1] = level - need[i]
        if not look.levels[i] or level < look.levels[i] then look.caps[i], look.levels[i] = cap, level end
      end
    end
    if cap_conc >= 0 and conc >= cap_conc then
      -- One of them ends, on average, once per usual duration over their number.
      local usual_ms = tonumber(v[8] or '1000') / math.max(conc, 1)
      refuse_longest(look, math.min(math.max(usual_ms, 50), 60000), SCOPE[s], 'concurrency', cap_conc, cap_conc - conc)
    end
    if budget >= 0 then
      if v[6] then
        set.held = v[7] or '0'
        local left = budget - tonumber(v[6]) - tonumber(set.held)
        if not look.left or left < look.left then look.left, look.tight = left, s end
      else
        look.seed = look.seed or s
      end
    end
    if s == 3 then
      set[#set + 1] = 'n'
      set[#set + 1] = tonumber(v[9] or '0') + 1
    end
    look[s] = set
  end
  return look
end

-- Cap, remaining and ms until full again, for requests, input and output tokens, once n_rq, n_in and n_out were taken;
-- -1 where nothing limits, and none of them where nothing limits any.
local function heads(look, n_rq, n_in, n_out)
  local out, taken = {}, {n_rq, n_in, n_out}
  if not (look.caps[1] or look.caps[2] or look.caps[3]) then return out end
  for i = 1, 3 do
    local cap = look.caps[i]
    local level = cap and look.levels[i] - taken[i]
    out[#out + 1] = cap or -1
    out[#out + 1] = cap and math.max(math.floor(level), 0) or -1
    out[#out + 1] = cap and math.ceil(math.max(cap - level, 0) * 60000 / math.max(cap, 1)) or -1
  end
  return out
end

-- The limits a record was admitted under: input_tpm, output_tpm, budget of key, project, organization.
local function caps_of(text)
  local caps = {}
  for c in string.gmatch(text, '[^,]+') do caps[#caps + 1] = tonumber(c) end
  return caps
end
