local function groups(stream, other) -- last ids by group; that of `other` is the stream's
  -- By a group of its own: XINFO STREAM returns entries too, which may have any size.
  redis.pcall('XGROUP', 'CREATE', stream, other, '$')
  local ids = {}
  for _, group in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
    local info = {}
    for i = 1, #group, 2 do info[group[i]] = group[i + 1] end
    ids[info['name']] = info['last-delivered-id']
  end
  redis.call('XGROUP', 'DESTROY', stream, other)
  return ids
end
local function is_exhausted(last)
  return last == '18446744073709551615-18446744073709551615'
end
