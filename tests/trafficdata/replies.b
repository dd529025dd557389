{"<-": {"QMP": {}}}
{"->": {"execute": "qmp_capabilities", "id": 1}}
{"<-": {"return": {"fd": 7, "fdset-id": 3}, "id": 1}}
{"->": {"execute": "add-fd", "arguments": {"opaque": "virtbackup-00000000-0"}, "id": 2}}
{"<-": {"return": {"fd": 7, "fdset-id": 3}, "id": 2}}
