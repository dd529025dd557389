{"<-": {"QMP": {}}}
{"->": {"execute": "qmp_capabilities", "id": 1}}
{"<-": {"return": {}, "id": 1}}
{"->": {"execute": "add-fd", "arguments": {"opaque": "virtbackup-00000000-0"}, "id": 2}}
{"<-": {"return": {}, "id": 2}}
{"->": {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "libvirt-1-formats", "backing": "libvirt-1-format", "file": {"driver": "file", "filename": "/dev/fdset/0", "node-name": "libvirt-1-formatf"}}, "id": 3}}
{"<-": {"return": {}, "id": 3}}
{"->": {"execute": "remove-fd", "arguments": {"fdset-id": 0}, "id": 4}}
{"<-": {"return": {}, "id": 4}}
{"->": {"execute": "nbd-server-start", "arguments": {"addr": {"type": "unix", "data": {"path": "/a.sock"}}}, "id": 5}}
{"<-": {"return": {}, "id": 5}}
{"->": {"execute": "transaction", "arguments": {"actions": [{"type": "blockdev-backup", "data": {"job-id": "virtbackup-00000000-0", "device": "libvirt-1-format", "target": "libvirt-1-formats", "sync": "none"}}]}, "id": 6}}
{"<-": {"return": {}, "id": 6}}
{"->": {"execute": "block-export-add", "arguments": {"type": "nbd", "id": "virtbackup-00000000-0", "node-name": "libvirt-1-formats", "name": "vda"}, "id": 7}}
{"<-": {"return": {}, "id": 7}}
{"->": {"execute": "block-job-cancel", "arguments": {"device": "virtbackup-00000000-0"}, "id": 8}}
{"<-": {"return": {}, "id": 8}}
{"->": {"execute": "job-dismiss", "arguments": {"id": "virtbackup-00000000-0"}, "id": 9}}
{"<-": {"return": {}, "id": 9}}
{"->": {"execute": "block-export-del", "arguments": {"id": "virtbackup-00000000-0"}, "id": 10}}
{"<-": {"return": {}, "id": 10}}
