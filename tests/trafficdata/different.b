2026-11-25T18:26:03.000001Z <- {"QMP": {}}
2026-11-25T18:26:03.000000Z -> {"execute":"qmp_capabilities","id":7}
2026-11-25T18:26:03.000000Z <- {"return": {}, "id": 7}
2026-11-25T18:26:03.000001Z -> {"execute":"query-jobs","id":8}
2026-11-25T18:26:03.000001Z <- {"return": {}, "id": 8}
2026-11-25T18:26:03.000002Z -> {"execute":"add-fd","arguments":{"opaque":"virtbackup-deadbeef-0"},"id":9}
2026-11-25T18:26:03.000002Z <- {"return": {}, "id": 9}
2026-11-25T18:26:03.000003Z -> {"execute":"blockdev-add","arguments":{"driver":"qcow2","node-name":"As","backing":"A","file":{"driver":"file","filename":"/dev/fdset/5","node-name":"Af"}},"id":10}
2026-11-25T18:26:03.000003Z <- {"return": {}, "id": 10}
2026-11-25T18:26:03.000004Z -> {"execute":"remove-fd","arguments":{"fdset-id":5},"id":11}
2026-11-25T18:26:03.000004Z <- {"return": {}, "id": 11}
2026-11-25T18:26:03.000005Z -> {"execute":"nbd-server-start","arguments":{"addr":{"type":"unix","data":{"path":"/b.sock"}}},"id":12}
2026-11-25T18:26:03.000005Z <- {"return": {}, "id": 12}
2026-11-25T18:26:03.000006Z -> {"execute":"transaction","arguments":{"actions":[{"type":"blockdev-backup","data":{"job-id":"j","device":"A","target":"As","sync":"none","auto-dismiss":false}}]},"id":13}
2026-11-25T18:26:03.000006Z <- {"return": {}, "id": 13}
2026-11-25T18:26:03.000007Z -> {"execute":"block-export-add","arguments":{"type":"nbd","id":"virtbackup-deadbeef-0","node-name":"As","name":"vda"},"id":14}
2026-11-25T18:26:03.000007Z <- {"return": {}, "id": 14}
2026-11-25T18:26:03.000008Z -> {"execute":"block-job-cancel","arguments":{"device":"virtbackup-deadbeef-0"},"id":15}
2026-11-25T18:26:03.000008Z <- {"return": {}, "id": 15}
2026-11-25T18:26:03.000009Z -> {"execute":"block-export-del","arguments":{"id":"virtbackup-deadbeef-0"},"id":16}
2026-11-25T18:26:03.000009Z <- {"return": {}, "id": 16}
