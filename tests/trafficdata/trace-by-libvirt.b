{"<-": {"QMP": {}}}
{"->": {"execute": "query-jobs", "id": 1}}
{"<-": {"return": [], "id": 1}}
