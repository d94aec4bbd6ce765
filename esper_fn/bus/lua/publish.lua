-- KEYS: stream, producer's last number, generation, run
-- ARGV: first number, limit, refuse?, seconds to remember the producer, group, a name for a
--       new generation, identity of the run ('' for any), then payload and signature of each entry
local generation = redis.call('GET', KEYS[3])
if not generation or #generation > 100 then
  generation = ARGV[6]
  redis.call('SET', KEYS[3], generation)
end
local first, limit = tonumber(ARGV[1]), tonumber(ARGV[2])
local count = (#ARGV - 7) / 2
local last = tonumber(string.match(redis.call('GET', KEYS[2]) or '', '^%d+$') or '-1')
local skip = math.max(0, last - first + 1)
if skip >= count then return {0, generation} end
if ARGV[7] ~= '' then
  local identity = redis.call('HGET', KEYS[4], 'identity') or ''
  if identity ~= ARGV[7] then return {-2, string.sub(identity, 1, 100)} end
end
local refuses = ARGV[3] == '1'
if refuses then
  local new = count - skip
  local total = redis.call('XLEN', KEYS[1])
  if total + new > limit then
    local waiting = total
    if total + new <= 10 * limit then
      for _, group in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
        local info = {}
        for i = 1, #group, 2 do info[group[i]] = group[i + 1] end
        if string.sub(info['name'], 1, #ARGV[5]) == ARGV[5] then
          -- The lag is unknown after entries were removed from the middle: count all then.
          if info['lag'] then waiting = info['lag'] + info['pending'] end
        end
      end
    end
    if waiting + new > limit then return {-1, waiting} end
  end
end
for i = skip, count - 1 do
  local payload, signature = ARGV[8 + 2 * i], ARGV[9 + 2 * i]
  if refuses then
    if signature == '' then redis.call('XADD', KEYS[1], '*', 'm', payload)
    else redis.call('XADD', KEYS[1], '*', 'm', payload, 's', signature) end
  else
    if signature == '' then redis.call('XADD', KEYS[1], 'MAXLEN', '~', limit, '*', 'm', payload)
    else
      redis.call('XADD', KEYS[1], 'MAXLEN', '~', limit, '*', 'm', payload, 's', signature)
    end
  end
end
redis.call('SET', KEYS[2], string.format('%.0f', first + count - 1), 'EX', ARGV[4])
return {count - skip, generation}
