-- Included by every trusted script that hands a request to a replica. P is the cell prefix, e.g. "c0:".
-- A bound request's body, journal and lease live under its machine's prefix and nowhere else, so that a machine
-- that lost the request can neither read nor write it. The message carries ids and the epoch only.

local LEASE_GC_MS = '21600000' -- text, as are other constants: a number is printed with 17 digits at each call

-- What a call knows of replicas, by id, and what it has to write of them: `come` and `gone` requests, `messages`,
-- `prefixes` (scores and members), keys to delete. Read once and written together by write_replicas, at the end of the
-- call and before whatever reads it in Redis (pump, in lib_queue).
local replicas, scraps = {}, {}
local PREFIX_CHARS = 8
local MAX_PREFIXES = 4096 -- remembered per replica, the least recently used forgotten first

local function replica_of(P, rid)
  local rep = replicas[rid]
  if not rep then
    rep = {key = P .. 'rep:' .. rid}
    replicas[rid] = rep
  end
  return rep
end

-- Whether a request is a canary's, by its id: a share of 65,536 (controlplane/policy/canary.py says the same).
local function takes(share, id)
  return tonumber(string.sub(id, -4), 16) < share
end

-- The machine of a replica that takes new work and has a free slot, and how many are free; nil otherwise. A canary takes
-- its share of the requests and no other; without `id` that is for the caller to ask (rep.share).
local function with_slot(P, rid, id)
  local rep = replica_of(P, rid)
  if not rep.n_free then
    local r = redis.call('HMGET', rep.key, 'state', 'used', 'slots', 'mid', 'ext', 'share')
    rep.share = r[6] and tonumber(r[6])
    rep.n_free = r[1] == 'ready' and tonumber(r[3] or '0') - tonumber(r[2] or '0') + (rep.gone and #rep.gone or 0) or 0
    rep.mid, rep.ext = r[4], r[5] -- ext: an endpoint elsewhere, which begins answers and continues none
  end
  if rep.n_free > 0 and not (id and rep.share and not takes(rep.share, id)) then return rep.mid, rep.n_free end
  return nil
end

local function add(rep, what, value)
  local list = rep[what]
  if list then list[#list + 1] = value else rep[what] = {value} end
end

local function write_prefixes(rep)
  if rep.prefixes then
    if redis.call('ZADD', rep.key .. ':px', unpack(rep.prefixes)) > 0 then
      redis.call('ZREMRANGEBYRANK', rep.key .. ':px', 0, -MAX_PREFIXES - 1)
    end
    rep.prefixes = nil
  end
end

local function write_replicas()
  for _, rep in pairs(replicas) do
    local more = 0
    if rep.gone then -- those that were there: a slot is freed once, whoever asks
      more = -redis.call('SREM', rep.key .. ':live', unpack(rep.gone))
      rep.gone = nil
    end
    if rep.come then
      more = more + #rep.come
      redis.call('SADD', rep.key .. ':live', unpack(rep.come))
      redis.call('LPUSH', rep.list, unpack(rep.messages))
      rep.come, rep.messages = nil, nil
    end
    if more ~= 0 and redis.call('HINCRBY', rep.key, 'used', string.format('%d', more)) < 0 then
      redis.call('HSET', rep.key, 'used', 0)
    end
    write_prefixes(rep)
  end
  if scraps[1] then
    redis.call('DEL', unpack(scraps))
    scraps = {}
  end
end

-- A replica that is given a request will hold its prefixes. Written by write_replicas.
local function note_prefixes(P, rid, pfx, now_ms)
  local rep = replica_of(P, rid)
  for i = 1, #pfx, PREFIX_CHARS do
    add(rep, 'prefixes', now_ms)
    add(rep, 'prefixes', string.sub(pfx, i, i + PREFIX_CHARS - 1))
  end
end

-- Moves the body under the machine's prefix; false when it is gone (expired or deleted: nothing to serve).
local function move_body(P, M, id)
  local moved = redis.pcall('RENAME', P .. 'body:' .. id, M .. 'body:' .. id)
  return not moved.err
end

-- Lease, slot and message of one attempt; the body lies under the machine's prefix already. The lease's `open` (see
-- flush.lua) is set by a claim and cleared here, by a release, a cancel, a reader that moves (attach.lua) and the end.
local function hand_over(P, M, id, rid, epoch, attempt, gw, stream, n, hold)
  local lease = M .. 'req:' .. id
  redis.call('HSET', lease, 'open', '', 'n', n, 'upto', n == '0' and hold or n + hold, 'epoch', epoch, 'state', 'bound', 'gw', gw,
             'stream', stream, 'attempt', attempt)
  redis.call('PEXPIRE', lease, LEASE_GC_MS)
  local rep = replica_of(P, rid)
  if rep.n_free then rep.n_free = rep.n_free - 1 end
  rep.list = M .. 'replica.' .. rid
  add(rep, 'come', id)
  add(rep, 'messages', message_of(id, epoch, id .. '.' .. epoch, rid))
end

-- Binds a request that waits (record present, body under P body:<id>) to a replica; returns the epoch, or nil when
-- the body is gone. `charged` is what the fair queue takes for it (nil: as before).
local function bind(P, id, rid, mid, charged)
  local rec_key, M = P .. 'req:' .. id, P .. 'm:' .. mid .. ':'
  if not move_body(P, M, id) then return nil end
  local rec = redis.call('HMGET', rec_key, 'gw', 'stream', 'n', 'hold_out', 'attempt', 'epoch', 'cancel', 'chg', 'adm')
  local epoch, attempt, n = tonumber(rec[6] or '0') + 1, tonumber(rec[5] or '0') + 1, rec[3] or '0'
  local hold = rec[4] or admitted(rec[9], rec_key)[OUT_EST]
  if attempt > 1 or n ~= '0' then
    redis.pcall('RENAME', P .. 'jrn:' .. id, M .. 'jrn:' .. id) -- an attempt before this one left a journal, or not
  end
  redis.call('HSET', rec_key, 'state', 'bound', 'rid', rid, 'mid', mid, 'epoch', epoch, 'attempt', attempt,
             'chg', charged or rec[8] or 0)
  hand_over(P, M, id, rid, epoch, attempt, rec[1], rec[2], n, hold)
  -- Its client left while another replica had it: this one only ends it and says what it used.
  if rec[7] then redis.call('HSET', M .. 'req:' .. id, 'cancel', 1) end
  return epoch
end

-- Takes a request off its replica: the slot is freed once, whoever asks, and journal and body come back to the
-- trusted side when keep is true, else they are deleted. The lease is deleted, so the old holder is fenced out.
local function free_slot(P, id, rid)
  local rep = replica_of(P, rid)
  if rep.n_free then rep.n_free = rep.n_free + 1 end
  add(rep, 'gone', id)
end

local function unbind(P, id, keep)
  local rec_key = P .. 'req:' .. id
  local rec = redis.call('HMGET', rec_key, 'rid', 'mid')
  local rid, mid = rec[1], rec[2]
  if not rid or rid == '' then return end
  local M = P .. 'm:' .. mid .. ':'
  free_slot(P, id, rid)
  if keep then
    local lease = redis.call('HMGET', M .. 'req:' .. id, 'n', 'upto')
    if lease[1] and lease[2] then redis.call('HSET', rec_key, 'n', lease[1], 'hold_out', lease[2] - lease[1]) end
    if redis.call('EXISTS', M .. 'body:' .. id) == 1 then redis.call('RENAME', M .. 'body:' .. id, P .. 'body:' .. id) end
    if redis.call('EXISTS', M .. 'jrn:' .. id) == 1 then redis.call('RENAME', M .. 'jrn:' .. id, P .. 'jrn:' .. id) end
    redis.call('DEL', M .. 'req:' .. id)
  else
    redis.call('DEL', M .. 'body:' .. id)
  end
  -- was_mid: where the journal of a finished request still lies.
  redis.call('HSET', rec_key, 'rid', '', 'mid', '', 'was_mid', mid)
end
