-- Takes up to ARGV[1] messages off Celery queues and, in the same step, records each as unacknowledged exactly as
-- kombu's Redis transport does with two later writes. So a consumer killed at any point has lost nothing.
--
-- KEYS: unacked hash, unacked index, then the queue lists in order of preference
-- ARGV: most messages to take, score for the index (seconds)
-- Returns {number of malformed messages dropped, list number (from 1), message, list number, message, …}

-- The value of a string field that occurs once, without decoding; nil when there is any doubt.
local function only_value(message, field)
  local quoted = '"' .. field .. '"'
  local first, last, value = string.find(message, quoted .. ': ?"([^"\\]*)"')
  if first and first == string.find(message, quoted, 1, true) and not string.find(message, quoted, last, true) then
    return value
  end
end

-- How the gateways' own messages end (contract.MESSAGE_TEMPLATE). Quotes inside a JSON string are escaped, so this is
-- no text of somebody's; and what ends the message is its last member.
local OWN = '"properties": {"correlation_id": "", "delivery_mode": 2, '
local OWN_END = '^"delivery_info": {"exchange": "", "routing_key": "([%w._-]+)"}, "priority": 0, "delivery_tag": "([%w._-]+)"}}$'
local OWN_CHARS = 400

local function address(message)
  local _, last = string.find(message, OWN, -OWN_CHARS, true)
  if last then
    local key, own_tag = string.match(message, OWN_END, last + 1)
    if key then return own_tag, '""', '"' .. key .. '"' end
  end
  local tag = only_value(message, 'delivery_tag')
  local exchange = only_value(message, 'exchange')
  local routing_key = only_value(message, 'routing_key')
  if tag and exchange and routing_key then
    return tag, '"' .. exchange .. '"', '"' .. routing_key .. '"'
  end
  local ok, decoded = pcall(cjson.decode, message)
  local properties = ok and type(decoded) == 'table' and decoded.properties
  if type(properties) ~= 'table' or type(properties.delivery_info) ~= 'table' then
    return nil
  end
  local info = properties.delivery_info
  tag = type(properties.delivery_tag) == 'string' and properties.delivery_tag
  return tag or nil, cjson.encode(info.exchange or ''), cjson.encode(info.routing_key or '')
end

local room, n_dropped = tonumber(ARGV[1]), 0
local reply, index, unacked = { 0 }, {}, {}
for list = 3, #KEYS do
  local messages = room > 0 and redis.call('RPOP', KEYS[list], room) or {}
  for _, message in ipairs(messages) do
    local tag, exchange, routing_key = address(message)
    if tag then
      index[#index + 1], index[#index + 2] = ARGV[2], tag
      unacked[#unacked + 1], unacked[#unacked + 2] = tag, '[' .. message .. ', ' .. exchange .. ', ' .. routing_key .. ']'
      reply[#reply + 1], reply[#reply + 2] = list - 2, message
    else
      n_dropped = n_dropped + 1
    end
  end
  room = room - #messages
end
if #index > 0 then
  redis.call('ZADD', KEYS[2], unpack(index))
  redis.call('HSET', KEYS[1], unpack(unacked))
end
reply[1] = n_dropped
return reply
