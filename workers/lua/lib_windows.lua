-- Included after lib_limits.lua by admission, top-up and settlement: budgets that begin anew with every day, week or
-- month, or reach back over the last hours (rolling). Which window it is says the clock of Redis, one for all gateways.
--
-- A request counts in the window it was admitted in, whenever it ends: its hold, its top-ups and its cost. The ledger
-- sums by the same instant, so that a counter read from it again is the same. The window before stays beside the present
-- one for the requests that began in it (`p…`); a request lives 6 hours at most, a window of the calendar a day.
--
-- A counter's hash holds: win, end (ms; of a rolling budget the latest bucket), spent (absent until seeded from the
-- ledger), held, n (requests in flight), ask (of them: used up their hold and found nothing left), and
-- pwin, pspent, pheld, pn, pask. Of a rolling budget `<key>:b` holds what was spent per bucket, at most n_buckets + 1 of
-- them: money comes back when a bucket has left the window as a whole, so that no span of that length exceeds the limit.
--
-- A budget is passed as an array: id, scope (1 key, 2 project, 3 organization), limit, width of a bucket (ms; 0: of the
-- calendar), n_buckets, then the edges of the calendar's windows near now (ms), ascending.
local ID, LEVEL, LIMIT, WIDTH, N_BUCKETS, EDGES, BEGAN = 1, 2, 3, 4, 5, 6, 6
local LIFE_AFTER_MS = 25200000 -- beyond the window: an hour longer than any request lives (lib_bind.lua)
local WINDOW_FIELDS = {'win', 'end', 'spent', 'held', 'n', 'ask', 'pwin', 'pspent', 'pheld', 'pn', 'pask'}

local function redis_ms()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

local function counter_of(P, id)
  local c = scopes[4][id]
  if not c then
    c = {key = P .. 'bud:' .. id, put = {}, changed = false}
    local v = redis.call('HMGET', c.key, unpack(WINDOW_FIELDS))
    for i, field in ipairs(WINDOW_FIELDS) do c[field] = tonumber(v[i]) end
    scopes[4][id] = c
  end
  return c
end

-- Of a rolling budget: `start` is its latest bucket from now on, and what lies too far back is forgotten.
local function forget_old(c, budget, start)
  local oldest, sum = start - budget[N_BUCKETS] * budget[WIDTH], 0
  local buckets = redis.call('HGETALL', c.key .. ':b')
  for i = 1, #buckets, 2 do
    if tonumber(buckets[i]) < oldest then
      redis.call('HDEL', c.key .. ':b', buckets[i])
    else
      sum = sum + tonumber(buckets[i + 1])
    end
  end
  put(c, 'spent', string.format('%.0f', sum))
  c.spent = sum
  put(c, 'win', start)
  put(c, 'end', start + budget[WIDTH])
  local life_ms = (budget[N_BUCKETS] + 1) * budget[WIDTH] + LIFE_AFTER_MS
  redis.call('PEXPIRE', c.key, life_ms)
  redis.call('PEXPIRE', c.key .. ':b', life_ms)
end

-- The window before stays for those who began in it.
local function roll_over(c, start, stop, now)
  for _, field in ipairs({'win', 'spent', 'held', 'n', 'ask'}) do put(c, 'p' .. field, c[field] or 0) end
  put(c, 'pspent', string.format('%.0f', c.spent))
  put(c, 'pheld', string.format('%.0f', c.held))
  c.pspent, c.pheld = c.spent, c.held
  put(c, 'win', start)
  put(c, 'end', stop)
  for _, field in ipairs({'spent', 'held', 'n', 'ask'}) do put(c, field, 0) end
  redis.call('PEXPIRE', c.key, stop - now + LIFE_AFTER_MS)
end

-- The budget's counter, in the window of this moment; nil and the window where it must be read from the ledger first:
-- never seen here, lost, or cut otherwise than before (another time zone).
local function counter_now(P, budget, now)
  local c, width, start, stop = counter_of(P, budget[ID]), budget[WIDTH], nil, nil
  if width > 0 then
    start = now - now % width
    stop = start + width
  else
    for i = EDGES, #budget - 1 do
      if budget[i] <= now and now < budget[i + 1] then start, stop = budget[i], budget[i + 1] end
    end
    if not start then return nil, 0, 0 end
  end
  if not c.spent then return nil, start, stop end
  if c.win == start and c['end'] == stop then return c, start, stop end
  if stop <= c.win then return c, c.win, c['end'] end -- another Redis took over, whose clock is behind
  if width > 0 then
    forget_old(c, budget, start)
  elseif start >= c['end'] then
    roll_over(c, start, stop, now)
  else
    return nil, start, stop
  end
  return c, start, stop
end

-- How long until `least` could be there, if nobody spends meanwhile; -1: never (the whole life's budget).
local function resets_in(c, budget, stop, now, least)
  local left = budget[LIMIT] - c.spent
  if left >= least then return 1000 end -- others hold it, and may give some back
  if budget[WIDTH] == 0 then return c.win > 0 and stop - now or -1 end
  local buckets, at = {}, {}
  local stored = redis.call('HGETALL', c.key .. ':b')
  for i = 1, #stored, 2 do
    local start = tonumber(stored[i])
    at[#at + 1], buckets[start] = start, tonumber(stored[i + 1])
  end
  table.sort(at)
  for _, start in ipairs(at) do
    left = left + buckets[start]
    if left >= least then return start + (budget[N_BUCKETS] + 1) * budget[WIDTH] - now end
  end
  return budget[N_BUCKETS] * budget[WIDTH]
end

-- Adds to what `examine` found: the least left here too. Answers a verdict where a counter must be seeded first.
local function examine_windows(P, budgets, look)
  local now = redis_ms()
  look.windows = {}
  for i, budget in ipairs(budgets) do
    local c, start, stop = counter_now(P, budget, now)
    if not c then return {'seed', 'bud', budget[ID], start, stop} end
    look.windows[i] = {c, budget, stop, now}
    local money = budget[LIMIT] - c.spent - c.held
    if not look.left or money < look.left then look.left, look.tight = money, 3 + i end
  end
end

-- The refusal by this window of what was looked at, which has `left` where `least` is needed.
local function refused_by(window, least, left)
  local c, budget, stop, at = unpack(window)
  return {SCOPE[budget[LEVEL]], 'budget ' .. budget[ID], resets_in(c, budget, stop, at, least), budget[LIMIT],
    math.max(left, 0)}
end

-- Holds at each, and answers what the settlement must know: id, scope, limit, width, n_buckets, window it began in.
local function take_windows(look, money)
  local began = {}
  for i, found in ipairs(look.windows) do
    local c, budget = found[1], found[2]
    put_money(c, 'held', money)
    put(c, 'n', (c.n or 0) + 1)
    began[i] = {budget[ID], budget[LEVEL], budget[LIMIT], budget[WIDTH], budget[N_BUCKETS], c.win}
  end
  return began
end

-- Where a request that began in a window counts: '' the present window, 'p' the one before, nil: nowhere any more.
local function place_of(c, began)
  if not c.spent then return nil end
  if began[WIDTH] > 0 or c.win == began[BEGAN] then return '' end
  return c.pwin == began[BEGAN] and 'p' or nil
end

local function settle_windows(P, all, money, cost, has_asked)
  for _, began in ipairs(all) do
    local c = counter_of(P, began[ID])
    local p = place_of(c, began)
    if p then
      put_money(c, p .. 'held', -money)
      put(c, p .. 'n', math.max((c[p .. 'n'] or 0) - 1, 0))
      if has_asked then put(c, p .. 'ask', math.max((c[p .. 'ask'] or 0) - 1, 0)) end
      if began[WIDTH] == 0 then
        put_money(c, p .. 'spent', cost)
      elseif cost > 0 and began[BEGAN] >= c.win - began[N_BUCKETS] * began[WIDTH] then
        redis.call('HINCRBY', c.key .. ':b', string.format('%.0f', began[BEGAN]), string.format('%.0f', cost))
        redis.call('PEXPIRE', c.key .. ':b', (began[N_BUCKETS] + 1) * began[WIDTH] + LIFE_AFTER_MS)
        put_money(c, 'spent', cost)
      end
    end
  end
end
