-- Included by admission and settlement: token buckets, concurrency and money holds of key, project and organization.
-- A scope's hash holds: rq, in, out (levels of the buckets at instant ms), conc (requests in flight), held (nano-dollars
-- held), spent (nano-dollars booked since the budget began; absent until seeded from the ledger).

local SCOPE = {'key', 'prj', 'org'}

local function scope_key(P, s, scope_id)
  return P .. 'lim:' .. SCOPE[s] .. ':' .. scope_id
end

-- Level of a bucket of `cap` units a minute, `elapsed_ms` after it stood at `stored`; a bucket never seen is full.
-- A refund may have lifted `stored` above the cap: clamped here, where it is read.
local function refilled(stored, cap, elapsed_ms)
  if not stored then return cap end
  return math.min(tonumber(stored) + elapsed_ms * cap / 60000, cap)
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
    redis.call('HINCRBY', h, field, string.format('%.0f', added))
  end
end
