-- Included by admission, top-up and settlement: token buckets, concurrency and money holds of key, project and
-- organization, and, where its project limits its end customers, of the one that a request is for. A scope's hash holds: rq, in, out (levels of the buckets at instant ms), conc (requests in flight),
-- dur (their usual duration, ms), n (requests of an organization, admitted or refused: its demand here), held
-- (nano-dollars held), spent (nano-dollars booked since the budget began; absent until seeded from the ledger), ask
-- (requests in flight that have used up their hold and found nothing left).

local SCOPE = {[0] = 'end', 'key', 'prj', 'org'}
local BUCKET = {'requests_per_minute', 'input_tokens_per_minute', 'output_tokens_per_minute'}
local FIELD = {'rq', 'in', 'out'}

-- Of end customers there may be any number: one that nobody has asked for in so long is forgotten. Longer than any
-- request lives (lib_bind.lua); its money is read from the ledger again.
local END_LIFE_MS = '25200000'

local function scope_key(P, s, scope_id)
  return P .. 'lim:' .. SCOPE[s] .. ':' .. scope_id
end

-- Level of a bucket of `cap` units a minute, `elapsed_ms` after it stood at `stored`. A refund may have lifted `stored`
-- above the cap: clamped here, where it is read.
local function refilled(stored, cap, elapsed_ms)
  return math.min(stored + elapsed_ms * cap / 60000, cap)
end

-- Level of a bucket never seen: full, unless this Redis lost what it knew less than a minute ago (`born`): then nobody
-- can say what was used, and it fills from empty.
local function unseen(P, cap, now)
  local born_ms = tonumber(redis.call('GET', P .. 'born') or '0')
  return refilled(0, cap, math.max(now - born_ms, 0))
end

-- What a call knows of scopes, by kind and id: their fields as numbers, and in `put` those to write. Read once and
-- written once, at the end of the call (write_scopes), so that requests of one tenant in one call share that.
-- The fourth kind are counters of window budgets (lib_windows.lua).
local scopes = {[0] = {}, {}, {}, {}, {}}

local function scope_of(P, s, scope_id)
  local scope = scopes[s][scope_id]
  if not scope then
    local h = scope_key(P, s, scope_id)
    local v = redis.call('HMGET', h, 'rq', 'in', 'out', 'ms', 'conc', 'spent', 'held', 'dur', 'n')
    scope = {
      key = h, put = {}, changed = false, rq = tonumber(v[1]), ['in'] = tonumber(v[2]), out = tonumber(v[3]),
      ms = tonumber(v[4]), conc = tonumber(v[5]) or 0, spent = tonumber(v[6]), held = tonumber(v[7]) or 0,
      dur = tonumber(v[8]), n = tonumber(v[9]) or 0,
    }
    scopes[s][scope_id] = scope
  end
  return scope
end

local function put(scope, field, value)
  scope[field], scope.put[field], scope.changed = value, value, true
end

local function write_scopes()
  for s = 0, 4 do
    for _, scope in pairs(scopes[s]) do
      if scope.changed then
        local set = {}
        for field, value in pairs(scope.put) do
          set[#set + 1] = field
          set[#set + 1] = value
        end
        redis.call('HSET', scope.key, unpack(set))
        if s == 0 then redis.call('PEXPIRE', scope.key, END_LIFE_MS) end
        scope.put, scope.changed = {}, false
      end
    end
  end
end

-- Adds to an integer amount of money: with the other fields where a double holds the sum exactly, by Redis' own 64-bit
-- integers beyond that.
local EXACT = 2 ^ 52

local function put_money(scope, field, added)
  local sum = scope[field] + added
  if math.abs(sum) < EXACT and math.abs(scope[field]) < EXACT then
    put(scope, field, sum) -- Redis prints 17 digits of a number: exact
  else
    write_scopes()
    scope[field] = redis.call('HINCRBY', scope.key, field, string.format('%.0f', added))
  end
end

-- So many more requests fit before a limit refuses: then the settlement of one may be a moment late.
local ROOMY, ROOMY_SLOTS = 64, 4
local is_roomy = false

local function refuse_longest(look, retry_ms, scope, limit, cap, left)
  if look.refusal and retry_ms <= look.refusal[3] then return end
  look.refusal = {scope, limit, retry_ms, cap, left}
end

-- What a request of n_in and n_out tokens finds at its scopes, seven arguments each from args[at]: id, rpm, input_tpm,
-- output_tpm, max_concurrency, budget_nano (-1 = no limit), weight (not for here). Reads only. With `look`, what was found
-- at those three, it looks at an end customer instead, which is scope 0. Answers a table:
--   0 (if there is one), 1, 2, 3: per scope what `take` needs: the scope, levels of its buckets (nil: no limit), whether it has a budget
--   refusal: {scope, limit, retry_ms, cap, left} of the limit that refuses longest, or nil
--   seed: number of a scope whose booked money is not known here, or nil
--   left: the least money left at a scope with a budget, or nil; tight: that scope's number
--   caps, levels: of requests, input and output tokens, each of the scope that has the fewest left
local function examine(P, now, args, at, n_in, n_out, look)
  local first, last = 1, 3
  if look then first, last = 0, 0 else look = {caps = {}, levels = {}, is_roomy = true} end
  local caps, levels, need = look.caps, look.levels, {1, n_in, n_out}
  for s = first, last do
    local a = at + (s - first) * 7
    local cap_conc, budget = tonumber(args[a + 4]), tonumber(args[a + 5])
    local scope = scope_of(P, s, args[a])
    local elapsed_ms = math.max(now - (scope.ms or now), 0)
    local conc, left = scope.conc, {scope}
    for i = 1, 3 do
      local cap = tonumber(args[a + i])
      if cap >= 0 then
        local stored = scope[FIELD[i]]
        local level = stored and refilled(stored, cap, elapsed_ms) or unseen(P, cap, now)
        -- What is larger than the whole minute is let through when the bucket is full, and the level goes negative.
        local enough = math.min(need[i], cap)
        if level < enough or cap == 0 then
          local wait_ms = (cap == 0 and 1 or enough - level) * 60000 / math.max(cap, 1)
          refuse_longest(look, wait_ms, SCOPE[s], BUCKET[i], cap, level)
        end
        left[i + 1] = level - need[i]
        if not levels[i] or level < levels[i] then caps[i], levels[i] = cap, level end
      end
    end
    if cap_conc >= 0 and conc + ROOMY > cap_conc then look.is_roomy = false end
    if cap_conc >= 0 and conc >= cap_conc then
      -- One of them ends, on average, once per usual duration over their number.
      local usual_ms = (scope.dur or 1000) / math.max(conc, 1)
      refuse_longest(look, math.min(math.max(usual_ms, 50), 60000), SCOPE[s], 'concurrency', cap_conc, cap_conc - conc)
    end
    if budget >= 0 then
      left[5] = true
      if scope.spent then
        local money = budget - scope.spent - scope.held
        if not look.left or money < look.left then look.left, look.tight = money, s end
      else
        look.seed = look.seed or s
      end
    end
    look[s] = left
  end
  return look
end

-- Takes from the scopes what `examine` found to be there.
local function take(look, now, money)
  for s = look[0] and 0 or 1, 3 do
    local left = look[s]
    local scope = left[1]
    put(scope, 'ms', math.max(now, scope.ms or now))
    put(scope, 'conc', scope.conc + 1)
    if left[2] then put(scope, 'rq', left[2]) end
    if left[3] then put(scope, 'in', left[3]) end
    if left[4] then put(scope, 'out', left[4]) end
    if s == 3 then put(scope, 'n', scope.n + 1) end
    if left[5] then put_money(scope, 'held', money) end
  end
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
