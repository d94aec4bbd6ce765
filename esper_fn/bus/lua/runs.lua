-- ARGV: cursor, pattern, bytes of a name at most. Keys as SCAN gives them, but short.
local answer = redis.call('SCAN', ARGV[1], 'MATCH', ARGV[2], 'COUNT', 500)
local names = {}
for _, name in ipairs(answer[2]) do
  if #name <= tonumber(ARGV[3]) then names[#names + 1] = name end
end
return {answer[1], names}
