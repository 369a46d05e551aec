local found = obj.status ~= nil and obj.status.health or {}
return {status = found.status or "Progressing", message = found.message or ""}
