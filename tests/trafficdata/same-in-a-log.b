{"<-": {"QMP": {}}}
{"->": {"execute": "qmp_capabilities", "id": 1}}
{"<-": {"return": {}, "id": 1}}
{"->": {"execute": "add-fd", "arguments": {"opaque": "virtbackup-deadbeef-0"}, "id": 2}}
{"<-": {"return": {}, "id": 2}}
{"->": {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "As", "backing": "A", "file": {"driver": "file", "filename": "/dev/fdset/5", "node-name": "Af"}}, "id": 3}}
{"<-": {"return": {}, "id": 3}}
{"->": {"execute": "remove-fd", "arguments": {"fdset-id": 5}, "id": 4}}
{"<-": {"return": {}, "id": 4}}
{"->": {"execute": "nbd-server-start", "arguments": {"addr": {"type": "unix", "data": {"path": "/b.sock"}}}, "id": 5}}
{"<-": {"return": {}, "id": 5}}
{"->": {"execute": "transaction", "arguments": {"actions": [{"type": "blockdev-backup", "data": {"job-id": "virtbackup-deadbeef-0", "device": "A", "target": "As", "sync": "none"}}]}, "id": 6}}
{"<-": {"return": {}, "id": 6}}
{"->": {"execute": "block-export-add", "arguments": {"type": "nbd", "id": "virtbackup-deadbeef-0", "node-name": "As", "name": "vda"}, "id": 7}}
{"<-": {"return": {}, "id": 7}}
{"->": {"execute": "block-job-cancel", "arguments": {"device": "virtbackup-deadbeef-0"}, "id": 8}}
{"<-": {"return": {}, "id": 8}}
{"->": {"execute": "job-dismiss", "arguments": {"id": "virtbackup-deadbeef-0"}, "id": 9}}
{"<-": {"return": {}, "id": 9}}
{"->": {"execute": "block-export-del", "arguments": {"id": "virtbackup-deadbeef-0"}, "id": 10}}
{"<-": {"return": {}, "id": 10}}
