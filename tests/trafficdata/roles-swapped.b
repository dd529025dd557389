{"<-": {"QMP": {}}}
{"->": {"execute": "qmp_capabilities", "id": 9}}
{"<-": {"return": {}, "id": 9}}
{"->": {"execute": "add-fd", "arguments": {"opaque": "virtbackup-00000000-0"}, "id": 10}}
{"<-": {"return": {}, "id": 10}}
{"->": {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "libvirt-1-formats", "backing": "libvirt-1-format", "file": {"driver": "file", "filename": "/dev/fdset/0", "node-name": "libvirt-1-formatf"}}, "id": 11}}
{"<-": {"return": {}, "id": 11}}
{"->": {"execute": "remove-fd", "arguments": {"fdset-id": 0}, "id": 12}}
{"<-": {"return": {}, "id": 12}}
{"->": {"execute": "nbd-server-start", "arguments": {"addr": {"type": "unix", "data": {"path": "/a.sock"}}}, "id": 13}}
{"<-": {"return": {}, "id": 13}}
{"->": {"execute": "transaction", "arguments": {"actions": [{"type": "blockdev-backup", "data": {"job-id": "j", "device": "libvirt-1-formats", "target": "libvirt-1-format", "sync": "none"}}]}, "id": 14}}
{"<-": {"return": {}, "id": 14}}
{"->": {"execute": "block-export-add", "arguments": {"type": "nbd", "id": "virtbackup-00000000-0", "node-name": "libvirt-1-formats", "name": "vda"}, "id": 15}}
{"<-": {"return": {}, "id": 15}}
{"->": {"execute": "block-job-cancel", "arguments": {"device": "virtbackup-00000000-0"}, "id": 16}}
{"<-": {"return": {}, "id": 16}}
{"->": {"execute": "job-dismiss", "arguments": {"id": "virtbackup-00000000-0"}, "id": 17}}
{"<-": {"return": {}, "id": 17}}
{"->": {"execute": "block-export-del", "arguments": {"id": "virtbackup-00000000-0"}, "id": 18}}
{"<-": {"return": {}, "id": 18}}
