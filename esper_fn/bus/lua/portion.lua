-- Entries of a stream up to a number and a size; of entries that are too large or foreign only the
-- size. Returns them, whether these were all, and where the next ones begin.
-- KEYS: stream. ARGV: entries at most, bytes, bytes of a whole entry at most, then one of
--   after, entry before the first | last | named, entries
--   new | again, group, consumer, entry before the first of those that it got already
local count, room, largest, kind = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
local stream, rows, is_all, following, is_large = KEYS[1], {}, 0, '', false
local function has_room() return #rows < count and room > 0 end
local function add(row, deliveries)
  local fields, size = row[2], 0
  for _, part in ipairs(fields) do size = size + #part end
  local payload, signature, withheld = '', '', size
  if fields[1] == 'm' and size <= largest then
    payload, withheld = fields[2], 0
    if fields[3] == 's' then signature = fields[4] end
  end
  room = room - #payload - withheld
  is_large = is_large or size > largest
  rows[#rows + 1] = {row[1], withheld, payload, signature, deliveries}
end
-- One by one: the server never holds more here than the largest entry.
if kind == 'after' then
  following = ARGV[5]
  while has_room() and is_all == 0 do
    local row = redis.call('XRANGE', stream, '(' .. following, '+', 'COUNT', 1)[1]
    if row then
      add(row, 1)
      following = row[1]
    else is_all = 1 end
  end
elseif kind == 'last' then
  local row = redis.call('XREVRANGE', stream, '+', '-', 'COUNT', 1)[1]
  if row then add(row, 1) end
elseif kind == 'named' then
  local next = 5
  while has_room() and next <= #ARGV do
    local row = redis.call('XRANGE', stream, ARGV[next], ARGV[next])[1]
    if row then add(row, 1) end
    next = next + 1
  end
  following = tostring(next - 5)
  if next > #ARGV then is_all = 1 end
else
  following = ARGV[7]
  while has_room() and is_all == 0 do
    local answer = redis.call(
      'XREADGROUP', 'GROUP', ARGV[5], ARGV[6], 'COUNT', 1, 'STREAMS', stream, following)
    local row = answer and answer[1][2][1]
    if row then
      local pending = redis.call('XPENDING', stream, ARGV[5], row[1], row[1], 1)
      if row[2] then add(row, pending[1] and pending[1][4] or 1)
      else redis.call('XACK', stream, ARGV[5], row[1]) end
      if following ~= '>' then following = row[1] end
    elseif following == '>' or kind == 'again' then is_all = 1
    else following = '>' end
  end
end
if is_large then collectgarbage() end
return {rows, is_all, following}
