-- A request has used up, or will soon have used up, the output tokens that its money pays for: hold more of what is
-- left at its key, project, organization and window budgets, and tell its replica. Run by the gateway when the replica asks. The
-- price of the prompt is corrected here too, once its exact count is known. Asking again changes nothing.
--
-- ARGV: 1 cell prefix, 2 request, 3 machine that asks, 4 tokens granted as the asker knows it, 5 exact prompt tokens,
--       6 'empty' when it waits for the answer, else 'soon', 7 rate of one prompt token, 8 of one output token (nano,
--       fractions), 9 share of what is left to hold at once (1/share; 0: all that was asked).
-- Returns {'more', granted} | {'wait'}: others hold what is left, ask again | {'final', granted}: nothing is left and
--         nobody is left to return any | {'gone'}: not this machine's request (any more).
-- Told to the replica on its control channel: `<request> <granted> <0 or 1: final>`.
local P, id, mid = ARGV[1], ARGV[2], ARGV[3]
local rec_key = P .. 'req:' .. id
local r = redis.call('HMGET', rec_key, 'state', 'mid', 'rid', 'adm', 'money', 'granted', 'asks')
if r[1] ~= 'bound' or r[2] ~= mid then return {'gone'} end
local M = P .. 'm:' .. mid .. ':'
local lease = redis.call('HMGET', M .. 'req:' .. id, 'n', 'upto')
if not (lease[1] and lease[2]) then return {'gone'} end
local unused = lease[2] - lease[1]
local adm = admitted(r[4], rec_key)
local asked, money = adm[OUT_EST], tonumber(r[5] or adm[MONEY])
local granted = tonumber(r[6] or asked)
local n = granted - unused -- tokens produced

local function tell(tokens, final)
  redis.call('PUBLISH', M .. 'ctl:' .. r[3], string.format('%s %d %d', id, tokens, final))
end

if tonumber(ARGV[4]) ~= granted then -- the answer was lost on its way
  tell(granted, 0)
  return {'more', granted}
end

local in_rate, out_rate, share = tonumber(ARGV[7]), tonumber(ARGV[8]), tonumber(ARGV[9])
local prompt_money = tonumber(ARGV[5]) * in_rate

local function price(tokens) return math.ceil(prompt_money + tokens * out_rate) end

-- How many output tokens `amount` pays for beside the prompt; -1 where it does not even pay for that.
local function tokens_for(amount)
  if prompt_money > amount then return -1 end
  if out_rate == 0 then return asked end
  local tokens = math.min(math.floor((amount - prompt_money) / out_rate), asked)
  while tokens >= 0 and price(tokens) > amount do tokens = tokens - 1 end
  return tokens
end

-- Keys of the scopes that have a budget.
local limited = {}
local left, tight = nil, nil
for s = adm[ENDS] and 0 or 1, 3 do
  local budget, scope_id = adm[CAPS + s * 3 - 1], adm[KEY + s - 1]
  if s == 0 then budget, scope_id = adm[ENDS][4], adm[ENDS][1] end
  if budget >= 0 then
    limited[#limited + 1] = scope_key(P, s, scope_id)
    local v = redis.call('HMGET', limited[#limited], 'spent', 'held', 'conc', 'ask', s == 0 and 'lease' or 'ask')
    if not v[1] then return {'wait'} end -- about to be read from the ledger
    -- Leased among several cells: the lease may have grown since; while this request holds money it does not shrink.
    if s == 0 and adm[ENDS][5] then budget = math.min(adm[ENDS][5], math.max(budget, tonumber(v[5] or '0'))) end
    local here = math.max(budget - tonumber(v[1]) - tonumber(v[2] or '0'), 0)
    if not left or here < left then left, tight = here, v end
  end
end
local windows = {}
for _, began in ipairs(adm[WINDOWS] or {}) do
  local c = counter_of(P, began[ID])
  if not c.spent then return {'wait'} end
  if began[WIDTH] > 0 then counter_now(P, began, redis_ms()) end
  local p = place_of(c, began)
  if p then
    windows[#windows + 1] = {c, p}
    local here = math.max(began[LIMIT] - c[p .. 'spent'] - c[p .. 'held'], 0)
    if not left or here < left then left, tight = here, {false, false, c[p .. 'n'], c[p .. 'ask']} end
  end
end
write_scopes()
left = left or math.huge

local paid, most = tokens_for(money), tokens_for(money + left)
local usable = math.min(granted, paid)
local now_granted = math.min(asked, most)
if share > 0 and out_rate > 0 and left < price(asked) * share then
  now_granted = math.min(now_granted, math.max(paid, n) + math.max(math.floor(left / share / out_rate), 1))
end
local has_asked = r[7] == '1'

-- Counts it at each scope with a budget among those that wait, or no longer.
local function count_waiting(by)
  for _, key in ipairs(limited) do redis.call('HINCRBY', key, 'ask', by) end
  for _, at in ipairs(windows) do put(at[1], at[2] .. 'ask', math.max((at[1][at[2] .. 'ask'] or 0) + by, 0)) end
  write_scopes()
  redis.call('HSET', rec_key, 'asks', by > 0 and 1 or 0)
end

if now_granted > usable and now_granted >= n then
  local added = price(now_granted) - money
  for _, key in ipairs(limited) do redis.call('HINCRBY', key, 'held', string.format('%.0f', added)) end
  for _, at in ipairs(windows) do put_money(at[1], at[2] .. 'held', added) end
  write_scopes()
  redis.call('HSET', rec_key, 'money', string.format('%.0f', money + added), 'granted', now_granted)
  redis.call('HSET', M .. 'req:' .. id, 'upto', lease[1] + now_granted - n)
  if has_asked then count_waiting(-1) end
  tell(now_granted, 0)
  return {'more', now_granted}
end
if ARGV[6] ~= 'empty' then return {'wait'} end
if usable > n then -- its prompt was counted and paid for before, and that answer was lost
  tell(usable, 0)
  return {'more', usable}
end
if not has_asked then count_waiting(1) end
-- Whoever is in flight here and does not wait may still return some of what it holds.
local n_waiting = tight and tonumber(tight[4] or '0') + (has_asked and 0 or 1) or 0
if tight and n_waiting < tonumber(tight[3] or '0') then return {'wait'} end
tell(math.max(usable, 0), 1)
return {'final', math.max(usable, 0)}
