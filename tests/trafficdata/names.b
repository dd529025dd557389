2026-11-25T18:26:03.000001Z <- {"QMP": {}}
2026-11-25T18:26:03.000000Z -> {"execute":"nbd-server-start","arguments":{"addr":{"type":"unix","data":{"path":"/b.sock"}}},"id":7}
2026-11-25T18:26:03.000000Z <- {"return": {}, "id": 7}
2026-11-25T18:26:03.000001Z -> {"execute":"transaction","arguments":{"actions":[{"type":"blockdev-backup","data":{"job-id":"virtbackup-deadbeef-0","device":"A","target":"As","sync":"none"}}]},"id":8}
2026-11-25T18:26:03.000001Z <- {"return": {}, "id": 8}
